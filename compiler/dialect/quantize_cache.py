"""`isofold::quantize_cache`: keys or values to packed codes with a pair for each token and head.

    u, (s, z) = quantize_activation((x - shift) H),   codes = pack(u)         (`cache_packing`)

Per token, so new tokens are joined to old ones without touching them. A shift of keys needs no undoing (the scores of
a query move by one number), one of values goes into the bias of what reads the attention; H on keys has its partner
on the queries. BITWISE `dequantize_cache(quantize_cache(x)) = quantize_dequantize(x, token)` without shift and H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..hadamard_orders import check_orders
from .cache_packing import ALIGN, pack_cache_codes, row_bytes
from .operator import Cost, operator, tensor_bytes
from .quantize_activation import quantize_activation


def _shape(x: Tensor, shift: Tensor | None, bits: int, hadamard: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    check_orders(hadamard, x.shape[-1])
    codes = x.new_empty([*x.shape[:-1], row_bytes(x.shape[-1], bits)], dtype=torch.uint8)
    return codes, x.new_empty([*x.shape[:-1], 2])


@operator(
    onnx_name="QuantizeCache",
    schema="(Tensor x, Tensor? shift, int bits, int[] hadamard=[]) -> (Tensor codes, Tensor params)",
    shape=_shape,
    cost=lambda x, shift, bits, hadamard=(): Cost(
        0, tensor_bytes(x) + int(x.numel()) * bits // 8, 4 * int(x.numel())
    ),
)
def quantize_cache(
    x: Tensor, shift: Tensor | None, bits: int, hadamard: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """x float `[..., D]` → codes uint8 `[..., Dp bits / 8]` and params `[..., 2]` in the dtype of x."""
    u, params = quantize_activation.reference(x, None, ALIGN, shift, None, bits, hadamard)
    return pack_cache_codes(u, bits), params
