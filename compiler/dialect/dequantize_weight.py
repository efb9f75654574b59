"""`isofold::dequantize_weight`: a float weight from integer codes, `scale * (codes - zero)` per group.

It stands where a quantized weight was, before packing. Exact up to one rounding of the product.
"""

from __future__ import annotations

from torch import Tensor

from .operator import Cost, operator, tensor_bytes
from .packing import dequantize


@operator(
    onnx_name="DequantizeWeight",
    schema="(Tensor codes, Tensor scale, Tensor? zero, int group_size) -> Tensor",
    shape=lambda codes, scale, zero, group_size: scale.new_empty(codes.shape),
    cost=lambda codes, scale, zero, group_size: Cost(
        tensor_bytes(codes, scale, zero), int(codes.numel()) * scale.element_size(), 2 * int(codes.numel())
    ),
)
def dequantize_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """codes int8 `[N, ...]`, scale `[N, G]`, zero `[N, G]` (int8; float32 where not whole) or None → weight with the
    shape of codes. Of several experts: codes `[E, N, K]`, scale and zero `[E, N, G]`."""
    if scale.dim() == 3:
        zeros = None if zero is None else zero.flatten(0, 1)
        return dequantize(codes.flatten(0, 1), scale.flatten(0, 1), zeros, group_size).reshape(codes.shape)
    return dequantize(codes, scale, zero, group_size)
