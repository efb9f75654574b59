"""`isofold::dequantize_outliers`: a float weight from integer codes and the few entries that they cannot hold.

    W = scale (codes - zero) + S,   S[n, places[n, j]] += values[n, j] * multiplier

It stands where a quantized weight was, before packing (`linear_outliers`). Exact up to the rounding of two sums.
"""

from __future__ import annotations

from torch import Tensor

from .operator import Cost, operator, tensor_bytes
from .outlier_packing import spread
from .packing import dequantize


@operator(
    onnx_name="DequantizeOutliers",
    schema=(
        "(Tensor codes, Tensor scale, Tensor? zero, Tensor places, Tensor values, float multiplier, int group_size) "
        "-> Tensor"
    ),
    shape=lambda codes, scale, *rest: scale.new_empty(codes.shape),
    cost=lambda codes, scale, zero, places, values, *rest: Cost(
        tensor_bytes(codes, scale, zero, places, values),
        int(codes.numel()) * scale.element_size(),
        2 * (int(codes.numel()) + int(values.numel())),
    ),
)
def dequantize_outliers(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    places: Tensor,
    values: Tensor,
    multiplier: float,
    group_size: int,
) -> Tensor:
    """codes int8 `[N, K]`, scale and zero as in `dequantize_weight`, places int32 and values float16 `[N, J]` → `[N,
    K]`."""
    dense = dequantize(codes, scale, zero, group_size)
    return dense + spread(places, values, multiplier, codes.shape[1], scale.dtype)
