"""`isofold::linear_grouped`: a linear whose rows choose their matrix, as the experts of a mixture are applied.

    y[s] = W[e[s]] x[s] + b[e[s]],   0 where e[s] is no expert

A grouped matrix product without its order: rows need not be sorted by expert.
"""

from __future__ import annotations

from torch import Tensor

from .grouped_rows import by_expert, bytes_read
from .operator import Cost, operator, tensor_bytes


def _cost(input: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
    rows, (_, n, k) = int(input.shape[0]), map(int, weight.shape)
    return Cost(bytes_read(rows, weight, bias), tensor_bytes(input, expert) + 4 * rows * n, 2 * rows * n * k)


@operator(
    onnx_name="GroupedLinear",
    schema="(Tensor input, Tensor expert, Tensor weight, Tensor? bias=None) -> Tensor",
    shape=lambda input, expert, weight, bias=None: input.new_empty([input.shape[0], weight.shape[1]]),
    cost=_cost,
)
def linear_grouped(input: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input `[S, K]`, expert int64 `[S]`, weight `[E, N, K]`, bias `[E, N]` → `[S, N]`."""
    count, n, _ = weight.shape
    return by_expert(input, expert, count, n, lambda e: weight[e], bias)
