"""`isofold::linear_outliers_float`: `linear_packed_float` whose matrix has a few entries more than its codes can hold.

    y = F.linear(x, scale (w - zero) + S) + bias, then the epilogue of `linear_packed`;   S as in `outlier_packing`.

Equal over the reals to the linear on that weight.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .outlier_packing import unpack_outliers
from .packing import unpack_weight


def _cost(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(weight, scale, zero, bias, places, values, offsets),
        tensor_bytes(x, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[4])) * k + 2 * rows * int(values.numel()),
    )


@operator(
    onnx_name="OutlierLinearFloat",
    schema=(
        "(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, Tensor? residual, Tensor places, "
        "Tensor values, Tensor offsets, int n, int k, int bits, int group_size, float scale_multiplier, "
        "str activation, bool gated, float outlier_multiplier) -> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([*x.shape[:-1], rest[8]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_outliers_float(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    places: Tensor,
    values: Tensor,
    offsets: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scale_multiplier: float,
    activation: str,
    gated: bool,
    outlier_multiplier: float,
) -> Tensor:
    """x float `[..., k]`, packed weight and outliers → `[..., n]` in the dtype of x."""
    rows = packed_rows(n, gated)
    matrix = unpack_weight(weight, scale, zero, rows, k, bits, group_size, scale_multiplier, x.dtype)
    matrix = matrix + unpack_outliers(places, values, offsets, rows, k, outlier_multiplier, x.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
