"""`isofold::linear_grouped_dense`: a float `linear_grouped` whose weights are stored in panels.

Each expert is stored as in `dense_packing`: the same numbers as `linear_grouped`, in another order in memory.
"""

from __future__ import annotations

from torch import Tensor

from .dense_packing import unpack_dense
from .grouped_rows import by_expert, bytes_read
from .operator import Cost, operator, tensor_bytes


def _cost(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, n: int, k: int) -> Cost:
    rows = int(x.shape[0])
    return Cost(bytes_read(rows, weight, bias), tensor_bytes(x, expert) + 4 * rows * n, 2 * rows * n * k)


@operator(
    onnx_name="GroupedDenseLinear",
    schema="(Tensor x, Tensor expert, Tensor weight, Tensor? bias, int n, int k) -> Tensor",
    shape=lambda x, expert, weight, bias, n, k: x.new_empty([x.shape[0], n]),
    cost=_cost,
    packed_argument="weight",
)
def linear_grouped_dense(
    x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None, n: int, k: int
) -> Tensor:
    """x float `[S, k]`, expert int64 `[S]`, panels `[E, ceil(n / 32), k, 32]` → `[S, n]` in the dtype of x."""

    def matrix(e: int) -> Tensor:
        return unpack_dense(weight[e], n).to(x.dtype)

    return by_expert(x, expert, weight.shape[0], n, matrix, bias)
