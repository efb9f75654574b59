"""`isofold::linear_grouped_packed_float`: `linear_grouped` with packed weights and float activations.

Equal over the reals to `linear_grouped` on the dequantized weights.
"""

from __future__ import annotations

from torch import Tensor

from .grouped_rows import by_expert, bytes_read
from .operator import Cost, operator, tensor_bytes
from .packing import unpack_weight


def _cost(
    x: Tensor, expert: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int,
    k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(x.shape[0])
    return Cost(
        bytes_read(rows, weight, scale, zero, bias), tensor_bytes(x, expert) + 4 * rows * n, 2 * rows * n * k
    )


@operator(
    onnx_name="GroupedPackedLinearFloat",
    schema=(
        "(Tensor x, Tensor expert, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, int n, int k, "
        "int bits, int group_size, float scale_multiplier) -> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([x.shape[0], rest[5]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_grouped_packed_float(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scale_multiplier: float,
) -> Tensor:
    """x float `[S, k]`, expert int64 `[S]`, packed weights `[E, ...]` → `[S, n]` in the dtype of x."""

    def matrix(e: int) -> Tensor:
        own = None if zero is None else zero[e]
        return unpack_weight(weight[e], scale[e], own, n, k, bits, group_size, scale_multiplier, x.dtype)

    return by_expert(x, expert, weight.shape[0], n, matrix, bias)
