"""`isofold::dequantize_codebook`: a float weight from additive codes, `scale * sum_m codebooks[m, codes[..., m]]`.

It stands where a quantized weight was, before packing (`packing_codebook.py`).
"""

from __future__ import annotations

from torch import Tensor

from .operator import Cost, operator, tensor_bytes
from .packing_codebook import dequantize_codebook_codes


@operator(
    onnx_name="DequantizeCodebook",
    schema="(Tensor codes, Tensor codebooks, Tensor scale, int k) -> Tensor",
    shape=lambda codes, codebooks, scale, k: scale.new_empty([codes.shape[0], k]),
    cost=lambda codes, codebooks, scale, k: Cost(
        tensor_bytes(codes, codebooks, scale),
        int(codes.shape[0]) * k * scale.element_size(),
        int(codes.shape[2] + 1) * int(codes.shape[0]) * k,
    ),
)
def dequantize_codebook(codes: Tensor, codebooks: Tensor, scale: Tensor, k: int) -> Tensor:
    """codes uint8 or uint16 `[N, ceil(k / 8), M]`, codebooks float `[M, 2^b, 8]`, scale `[N]` → `[N, k]` as scale."""
    return dequantize_codebook_codes(codes, codebooks, scale, k, scale.dtype)
