"""`isofold::dequantize_coded`: a float weight from codes of a table or of small floats (`element_formats.py`).

It stands where a quantized weight was, before packing; the counterpart of `dequantize_weight` for formats that are not
plain integers.
"""

from __future__ import annotations

from torch import Tensor

from .operator import Cost, operator, tensor_bytes
from .packing_coded import dequantize_codes


@operator(
    onnx_name="DequantizeCoded",
    schema="(Tensor codes, Tensor scale, Tensor multiplier, Tensor? table, str format, int group_size) -> Tensor",
    shape=lambda codes, scale, multiplier, *rest: multiplier.new_empty(codes.shape),
    cost=lambda codes, scale, multiplier, table, *rest: Cost(
        tensor_bytes(codes, scale, multiplier, table),
        int(codes.numel()) * multiplier.element_size(),
        2 * int(codes.numel()),
    ),
)
def dequantize_coded(
    codes: Tensor, scale: Tensor, multiplier: Tensor, table: Tensor | None, format: str, group_size: int
) -> Tensor:
    """codes uint8 `[N, K]`, scale `[N, G]` (float, or uint8 codes of E8M0 or E4M3), multiplier float `[]`, the scale of
    the tensor, table float32 `[16]` (table4) → weight `[N, K]` in the dtype of multiplier."""
    return dequantize_codes(codes, scale, multiplier, table, format, group_size, multiplier.dtype)
