"""Rows that are sorted, worked on one by one and put back need no sorting.

    f(x[p])[p^-1] = f(x),   p the order of a sort

f works on every row by itself: pointwise operators, grouped and other linears, norms and views of the dimensions
behind the first. p^-1 is spelled as `index_put(empty, [p], arange)`. Where each source row stands for k
rows in a row (`x[p // k]`), f reads x with each row repeated k times.

Mixtures of experts sort rows by expert for grouped matrix products, which `isofold.linear_grouped` does not need; after
this, neither sort nor permutation is left.

Side conditions: one-dimensional sort; every value between the sort and the last index that depends on the order of rows
is one of the above. Exactness: real (a product of matrices may sum in another order when its rows move).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..dialect import gated, linear_grouped
from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .match import aten, dimensions, equal_sizes, is_call, operands

_ROWWISE = (linear_grouped.overload, aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
_SHAPED = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.softmax.int,
    aten.chunk.default,
)


@define_pass(Guarantee.REAL)
def remove_sorting(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.index.Tensor):
        source, indices = operands(node)[:2]
        order = _inverted(editor, indices[0]) if len(indices) == 1 else None
        if order is None or not isinstance(source, fx.Node):
            continue
        rows = _Unsorted(editor, operands(order)[0])
        new = rows.of(source)
        if new is None:
            rows.discard()
            editor.refused(node, f"rows stay sorted: {rows.reason}")
            continue
        editor.applied(node, "rows that are sorted and put back are left in their order")
        editor.replace(node, new)


def _inverted(editor: Editor, index: object) -> fx.Node | None:
    """p where the index is the inverse of the order p of a one-dimensional sort."""
    if not is_call(index, aten.index_put.default) or argument(index, "accumulate"):
        return None
    target, places, values = operands(index)[:3]
    order = places[0] if len(places) == 1 else None
    if not is_call(order, operator.getitem) or operands(order)[1] != 1:
        return None
    held = editor.tensor(values)
    if held is not None:
        if held.dim() != 1 or not torch.equal(held, torch.arange(len(held), dtype=held.dtype)):
            return None
    elif not is_call(values, aten.arange.default):
        return None
    sizes = [shape(n) or () for n in (target, order, values)]
    alike = all(len(s) == 1 and equal_sizes(s[0], sizes[0][0]) for s in sizes)
    return order if alike and is_call(operands(order)[0], aten.sort.default, aten.sort.stable) else None


class _Unsorted:
    """Values as they are without the sort, made anew on the way; `of` is None where one depends on the order."""

    def __init__(self, editor: Editor, sort: fx.Node) -> None:
        self.editor, self.sort = editor, sort
        self.rows = (shape(operands(sort)[0]) or (0,))[0]
        self.made: list[fx.Node] = []
        self.known: dict[fx.Node, fx.Node] = {}
        self.reason = ""

    def of(self, node: fx.Node) -> fx.Node | None:
        """The unsorted form of a value with sorted rows."""
        if node not in self.known:
            found = self._of(node)
            if found is None:
                self.reason = (
                    self.reason or f"{node.name} ({node.target}) is not known to work on each row by itself"
                )
                return None
            self.known[node] = found
        return self.known[node]

    def discard(self) -> None:
        """Erase what was made."""
        for node in reversed(self.made):
            if not node._erased and not node.users:
                self.editor.graph.erase_node(node)

    def _call(self, like: fx.Node, target: object, *args: object, **kwargs: Any) -> fx.Node:
        self.made.append(self.editor.call(target, *args, like=like, **kwargs))
        return self.made[-1]

    def _of(self, node: fx.Node) -> fx.Node | None:
        if node.op != "call_function":
            return None
        if is_call(node, operator.getitem):
            source, which = operands(node)
            if source is self.sort:
                return operands(self.sort)[0] if which == 0 else None
            new = self.of(source)
            return None if new is None else self._call(node, operator.getitem, new, which)
        if is_call(node, aten.index.Tensor):
            return self._of_index(node)
        if is_call(node, aten.layer_norm.default, aten.rms_norm.default) and len(
            argument(node, "normalized_shape")
        ) >= len(shape(node) or ()):
            return None
        if is_call(node, *_ROWWISE):
            return self._again(node, 2 if node.target is linear_grouped.overload else 1)
        if is_call(node, *_SHAPED):
            dims = dimensions(operands(node)[0], argument(node, "dim"))
            return self._again(node, 1) if dims is not None and 0 not in dims else None
        if is_call(node, aten.unsqueeze.default):
            return self._again(node, 1) if argument(node, "dim") % len(shape(node) or (0,)) else None
        if is_call(node, gated.overload) or _is_pointwise(node):
            return self._again(node, None)
        return None

    def _of_index(self, node: fx.Node) -> fx.Node | None:
        source, indices = operands(node)[:2]
        if len(indices) != 1 or not isinstance(indices[0], fx.Node):
            return None
        index, many = indices[0], 1
        if is_call(index, aten.floor_divide.default) and isinstance(operands(index)[1], int):
            index, many = operands(index)
        if not is_call(index, operator.getitem) or operands(index) != (self.sort, 1):
            chosen = self.of(index) if many == 1 else None
            return None if chosen is None else self._call(node, aten.index.Tensor, source, [chosen])
        size = shape(source) or (0,)
        if not equal_sizes(size[0] * many, self.rows):
            return None
        if many == 1:
            new: fx.Node = source
            return new
        wide = self._call(node, aten.unsqueeze.default, source, 1)
        wide = self._call(node, aten.expand.default, wide, [-1, many, *[-1] * (len(size) - 1)])
        if any(not isinstance(s, int) for s in size[1:]):
            return None
        return self._call(node, aten.reshape.default, wide, [-1, *size[1:]])

    def _again(self, node: fx.Node, count: int | None) -> fx.Node | None:
        """The call on unsorted rows; only the first `count` arguments have rows, None: all that could."""
        args = list(operands(node))
        for position, operand in enumerate(args if count is None else args[:count]):
            if isinstance(operand, fx.Node) and (count is not None or self._depends(operand, node)):
                args[position] = self.of(operand)
                if args[position] is None:
                    return None
        if any(isinstance(a, fx.Node) for a in node.kwargs.values()):
            return None
        return self._call(node, node.target, *args, **node.kwargs)

    def _depends(self, operand: fx.Node, node: fx.Node) -> bool:
        """Whether an operand of a pointwise call has rows of its own (one that is broadcast over them has not)."""
        size, result = shape(operand) or (), shape(node) or ()
        return len(size) > 0 and len(size) == len(result) and not equal_sizes(size[0], 1)


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
