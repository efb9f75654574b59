"""Products of rows with a matrix that each row chooses become `isofold.linear_grouped`.

    grouped_mm(x, W^T, offsets)                              → linear_grouped(x, e, W)
    squeeze(bmm(W[e], unsqueeze(x, -1)), -1)                 → linear_grouped(x, e, W)
    squeeze(bmm(unsqueeze(x, 1), W[e]), 1)                   → linear_grouped(x, e, W^T)
    linear_grouped(x, e, W) + b[e]                           → linear_grouped(x, e, W, b)

A grouped matrix product (`aten._grouped_mm`, and what transformers exports in its place) takes rows that lie expert by
expert, and the row behind the last of each. The expert of row s is the number of offsets that are at most s. Where the
offsets are the running sum of a histogram of sorted numbers, that is the number itself.

Side conditions: x has two dimensions and the weights three; an index into the weights is never negative (a negative
one counts from the end, and the dialect has none; indices of topk, sort and argmax are not). Rows behind the
last offset, which `aten._grouped_mm` leaves as they are, are 0. Exactness: real (another order of one sum).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..dialect import linear_grouped
from ..editor import Editor
from ..graph import argument, dtype, only_user, shape
from ..passes import Guarantee, define_pass
from .match import (
    ADDITIONS,
    CASTS,
    RESHAPES,
    VIEWS,
    aten,
    either_order,
    equal_sizes,
    fake_dim,
    is_call,
    operands,
    permutation,
    scalar,
)

_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
_TRANSPOSITIONS = (aten.transpose.int, aten.permute.default)


@define_pass(Guarantee.REAL)
def canonicalize_grouped_linear(editor: Editor) -> None:
    """See the module."""
    for node in list(editor.graph.nodes):
        if node._erased or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.name in _GROUPED:
            _from_offsets(editor, node)
        elif node.target in (aten.bmm.default, aten.matmul.default):
            _from_index(editor, node)
    for node in editor.calls(linear_grouped.overload):
        _absorb_bias(editor, node)


def _from_offsets(editor: Editor, node: fx.Node) -> None:
    x, matrices, offsets = (*operands(node), None)[:3]
    offsets = node.kwargs.get("offs", offsets)
    if offsets is None or fake_dim(x) != 2 or fake_dim(matrices) != 3:
        editor.refused(node, "a grouped product is not of rows with a matrix for each group")
        return
    rest = [*operands(node)[3:], *(v for k, v in node.kwargs.items() if k != "offs")]
    if any(v is not None and v != dtype(x) for v in rest):
        editor.refused(node, "a grouped product has a bias or another type of result")
        return
    weight = _transposed(editor, matrices, node)
    expert = _sorted_numbers(offsets, (shape(matrices) or ())[0])
    if expert is None:
        rows = editor.call(aten.sym_size.int, x, 0, like=node)
        index = editor.call(aten.arange.default, rows, like=node)
        index = editor.call(aten.unsqueeze.default, index, 1, like=node)
        passed = editor.call(aten.le.Tensor, offsets, index, like=node)
        expert = editor.call(aten.sum.dim_IntList, passed, [1], like=node)
    editor.applied(node, "a grouped product with offsets chooses a matrix for each row")
    editor.replace(node, editor.call(linear_grouped.overload, x, expert, weight, like=node))


def _sorted_numbers(offsets: object, count: Any) -> fx.Node | None:
    """v where offsets = cumsum(histc(v, count, 0, count - 1)), v sorted and not negative."""
    histogram = operands(offsets)[0] if is_call(offsets, aten.cumsum.default) else None
    if not is_call(histogram, aten.histc.default):
        return None
    bins, low, high = (argument(histogram, name) for name in ("bins", "min", "max"))
    values = operands(histogram)[0]
    while is_call(values, *CASTS):
        values = operands(values)[0]
    sort = operands(values)[0] if is_call(values, operator.getitem) and operands(values)[1] == 0 else None
    if not is_call(sort, aten.sort.default) or argument(sort, "descending") or fake_dim(values) != 1:
        return None
    fits = bins == count and low == 0 and high == count - 1 and dtype(values) == torch.int64
    return values if fits and _not_negative(operands(sort)[0]) else None


def _not_negative(node: object) -> bool:
    """Whether whole numbers are known to be at least 0: places that were found, and views and choices of them."""
    if is_call(node, aten.argmax.default, aten.argmin.default, aten.argsort.default):
        return True
    if is_call(node, operator.getitem):
        source, which = operands(node)
        if which == 1:
            return is_call(source, aten.topk.default, aten.sort.default, aten.max.dim, aten.min.dim)
        return which == 0 and is_call(source, aten.sort.default) and _not_negative(operands(source)[0])
    if is_call(node, aten.clamp.default):
        low = argument(node, "min")
        return isinstance(low, (int, float)) and low >= 0
    return is_call(
        node, *VIEWS, aten.index.Tensor, aten.expand.default, aten.clone.default
    ) and _not_negative(operands(node)[0])


def _from_index(editor: Editor, node: fx.Node) -> None:
    """A batched product of one row each with an index into the weights."""
    left, right = operands(node)[:2]
    if is_call(left, aten.index.Tensor):
        chosen, column, dim = left, right, -1
    elif is_call(right, aten.index.Tensor):
        chosen, column, dim = right, left, 1
    else:
        return
    weights, index = operands(chosen)[:2]
    if fake_dim(weights) != 3 or fake_dim(column) != 3 or len(index) != 1 or fake_dim(index[0]) != 1:
        return
    x = _row_of(column, dim)
    users = list(node.users)
    if x is None or not users or not all(_row_of_result(user, dim) for user in users):
        return
    if dtype(index[0]) != torch.int64 or not _not_negative(index[0]):
        editor.refused(node, "the index into its weights may be negative, which counts from the end")
        return
    weight = weights if dim == -1 else _transposed(editor, weights, node)
    editor.applied(node, "a product with chosen matrices is a grouped linear")
    new = editor.call(linear_grouped.overload, x, index[0], weight, like=node)
    for user in users:
        editor.replace(user, new)


def _row_of(column: fx.Node, dim: int) -> fx.Node | None:
    """x `[S, K]` of `[S, K, 1]` (dim -1) or `[S, 1, K]` (dim 1)."""
    if not is_call(column, aten.unsqueeze.default, *RESHAPES):
        return None
    x: fx.Node = operands(column)[0]
    wide, flat = list(shape(column) or ()), list(shape(x) or ())
    one = wide.pop(dim)
    alike = len(flat) == 2 and all(equal_sizes(a, b) for a, b in zip(wide, flat, strict=True))
    return x if alike and equal_sizes(one, 1) else None


def _row_of_result(user: fx.Node, dim: int) -> bool:
    """Whether a reader drops the dimension of size 1 again."""
    if is_call(user, aten.select.int):
        if operands(user)[1] % 3 != dim % 3:
            return False
    elif not is_call(user, aten.squeeze.dim, aten.squeeze.dims, *RESHAPES):
        return False
    wide, flat = list(shape(operands(user)[0]) or ()), list(shape(user) or ())
    wide.pop(dim)
    return len(flat) == 2 and all(equal_sizes(a, b) for a, b in zip(wide, flat, strict=True))


def _transposed(editor: Editor, matrices: fx.Node, like: fx.Node) -> fx.Node:
    """`[E, N, K]` of `[E, K, N]`."""
    if is_call(matrices, *_TRANSPOSITIONS) and permutation(matrices) == [0, 2, 1]:
        source: fx.Node = operands(matrices)[0]
        return source
    held = editor.tensor(matrices)
    if held is not None:
        return editor.constant(held.transpose(1, 2), f"{editor.name_of(matrices)}_transposed")
    return editor.call(aten.transpose.int, matrices, 1, 2, like=like)


def _absorb_bias(editor: Editor, linear: fx.Node) -> None:
    addition = only_user(linear)
    if not is_call(addition, *ADDITIONS) or argument(linear, "bias") is not None:
        return
    x, expert, weight = operands(linear)[:3]
    for left, right in either_order(addition):
        if left is not linear or not is_call(right, aten.index.Tensor):
            continue
        bias, index = operands(right)[:2]
        fits = list(index) == [expert] and len(shape(bias) or ()) == 2
        if fits and scalar(editor, argument(addition, "alpha")) == 1 and dtype(bias) == dtype(linear):
            editor.applied(addition, "a chosen row that is added is the bias of a grouped linear")
            new = editor.call(linear_grouped.overload, x, expert, weight, bias, like=linear, before=addition)
            editor.replace(addition, new)
            return
