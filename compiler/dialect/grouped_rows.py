"""Rows that choose their matrix: what the `linear_grouped` operators share.

Row s of the result is row s of the input times the matrix of expert `expert[s]`. A row whose expert is not one of
0..E-1 is 0: what a grouped matrix product leaves behind its last offset.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from .operator import tensor_bytes


def by_expert(
    x: Tensor, expert: Tensor, count: int, n: int, matrix: Callable[[int], Tensor], bias: Tensor | None
) -> Tensor:
    """x `[S, K]`, expert `[S]`, `matrix(e)` `[n, K]`, bias `[E, n]` → `[S, n]` in the dtype of x."""
    y = x.new_zeros([x.shape[0], n])
    for e in expert.unique().tolist():
        if 0 <= e < count:
            rows = (expert == e).nonzero()[:, 0]
            own = None if bias is None else bias[e]
            y = y.index_copy(0, rows, F.linear(x[rows], matrix(e), own))
    return y


def bytes_read(rows: int, *tensors: Tensor | None) -> int:
    """Bytes of what `rows` rows read of tensors `[E, ...]`: at most an expert for each."""
    total = 0
    for tensor in tensors:
        if tensor is not None and tensor.shape[0]:
            total += tensor_bytes(tensor) // int(tensor.shape[0]) * min(rows, int(tensor.shape[0]))
    return total
