"""`isofold::linear_outliers`: `linear_packed` whose matrix has a few entries more than its codes can hold.

    y[n] = s ( dense sums of linear_packed[n]  +  sum_k u_k S[n, k] )  -  s z wsum[n]  +  bias[n]

S is stored as `outlier_packing` says, and `wsum[n] = sum_k W[n, k]` counts it, so the zero point of activations costs
nothing more. Equal over the reals to the linear on `scale (w - zero) + S`; epilogue and gating as in `linear_packed`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .outlier_packing import unpack_outliers
from .packing import unpack_weight


def _cost(
    u: Tensor, params: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, wsum: Tensor,
    bias: Tensor | None, residual: Tensor | None, places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int,
    *rest: object,
) -> Cost:  # fmt: skip
    rows = int(u.numel()) // int(u.shape[-1]) if u.numel() else 0
    return Cost(
        tensor_bytes(weight, scale, zero, wsum, bias, places, values, offsets),
        tensor_bytes(u, params, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[4])) * k + 2 * rows * int(values.numel()),
    )


@operator(
    onnx_name="OutlierLinear",
    schema=(
        "(Tensor u, Tensor params, Tensor weight, Tensor scale, Tensor? zero, Tensor wsum, Tensor? bias, "
        "Tensor? residual, Tensor places, Tensor values, Tensor offsets, int n, int k, int bits, int group_size, "
        "float scale_multiplier, str activation, bool gated, float outlier_multiplier) -> Tensor"
    ),
    shape=lambda u, params, *rest: params.new_empty([*u.shape[:-1], rest[9]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_outliers(
    u: Tensor,
    params: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    wsum: Tensor,
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
    """u uint8 `[..., Kp]`, params `[..., 2]` or `[2]`, packed weight and outliers → `[..., n]` in the dtype of
    params."""
    rows = packed_rows(n, gated)
    matrix = unpack_weight(weight, scale, zero, rows, k, bits, group_size, scale_multiplier, params.dtype)
    matrix = matrix + unpack_outliers(places, values, offsets, rows, k, outlier_multiplier, params.dtype)
    x = params[..., :1] * (u[..., :k].to(params.dtype) - params[..., 1:])
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
