"""`isofold::linear_grouped_packed`: `linear_grouped` whose activations and weights are integers.

The arithmetic of `linear_packed` in every row, with the codes, scales, zero points and sums of the row's expert. Each
expert is packed like a matrix of its own; `scale_multiplier` is one for all.
"""

from __future__ import annotations

from torch import Tensor

from .grouped_rows import by_expert, bytes_read
from .operator import Cost, operator, tensor_bytes
from .packing import unpack_weight


def _cost(
    u: Tensor, params: Tensor, expert: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, wsum: Tensor,
    bias: Tensor | None, n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(u.shape[0])
    return Cost(
        bytes_read(rows, weight, scale, zero, wsum, bias),
        tensor_bytes(u, params, expert) + 4 * rows * n,
        2 * rows * n * k,
    )


@operator(
    onnx_name="GroupedPackedLinear",
    schema=(
        "(Tensor u, Tensor params, Tensor expert, Tensor weight, Tensor scale, Tensor? zero, Tensor wsum, "
        "Tensor? bias, int n, int k, int bits, int group_size, float scale_multiplier) -> Tensor"
    ),
    shape=lambda u, params, *rest: params.new_empty([u.shape[0], rest[6]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_grouped_packed(
    u: Tensor,
    params: Tensor,
    expert: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    wsum: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scale_multiplier: float,
) -> Tensor:
    """u uint8 `[S, Kp]`, params `[S, 2]` or `[2]`, expert int64 `[S]`, packed weights `[E, ...]` → `[S, n]`."""

    def matrix(e: int) -> Tensor:
        own = None if zero is None else zero[e]
        return unpack_weight(weight[e], scale[e], own, n, k, bits, group_size, scale_multiplier, params.dtype)

    x = params[..., :1] * (u[..., :k].to(params.dtype) - params[..., 1:])
    return by_expert(x, expert, weight.shape[0], n, matrix, bias)
