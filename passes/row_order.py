"""Which output features of a packed linear a value consists of, and in what order.

Between a linear `[..., N]` and its readers stand views, slices and transposes. They only rename indices,
so running them on the numbers 0..N-1 in place of the values tells which row of the weight each element comes
from: with these numbers the rows of the packed weight can be put in the order that the reader wants, and the
renaming operators go. Dimensions that do not come from the features (batch, sequence) have size 1 there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import RESHAPES, is_call, slice_bounds
from ..compiler.graph import argument, shape
from .packed_rows import LINEARS

aten = torch.ops.aten


@dataclass(frozen=True)
class RowOrder:
    """Where a value's elements come from."""

    linear: fx.Node
    rows: Tensor
    """int64: the linear's output feature at each index of the feature dimensions."""
    chain: tuple[fx.Node, ...]
    """All nodes from the linear (included) to the value (included)."""
    leading: tuple[Any, ...] | None
    """Sizes before the features, as a view in the chain spells them; None where there is none."""


@dataclass
class _Trace:
    linear: fx.Node
    rows: Tensor
    outer: list[int]
    """Positions of the dimensions that do not come from the features."""
    chain: list[fx.Node]
    leading: tuple[Any, ...] | None = None


def row_order(node: Any) -> RowOrder | str:
    """The order, or what stands between the value and a packed linear. The outer dimensions must come first."""
    trace = _trace(node)
    if isinstance(trace, str):
        return trace
    if trace.outer != list(range(len(trace.outer))):
        return "its features do not come last"
    return RowOrder(trace.linear, _inner(trace), tuple(dict.fromkeys(trace.chain)), trace.leading)


def _inner(trace: _Trace) -> Tensor:
    return trace.rows.reshape(trace.rows.shape[len(trace.outer) :])


def _trace(node: Any) -> _Trace | str:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return f"{getattr(node, 'name', node)} is no packed linear"
    if is_call(node, *LINEARS):
        outer = len(shape(node) or ()) - 1
        rows = torch.arange(argument(node, "n")).reshape([1] * outer + [-1])
        return _Trace(node, rows, list(range(outer)), [node])
    picked = node.target is operator.getitem and is_call(node.args[0], aten.unbind.int)
    renamed = is_call(node, *RESHAPES, *_RULES)
    source: Any = node.args[0]
    if not picked and not renamed:
        return f"{node.name} ({node.target}) stands between"
    trace = _trace(source.args[0] if picked else source)
    if isinstance(trace, str):
        return trace
    changed = _pick(node, trace) if picked else _rename(node, trace)
    if not changed:
        return f"{node.name} ({node.target}) mixes features with other dimensions"
    trace.chain += [source, node] if picked else [node]
    return trace


def _rename(node: fx.Node, trace: _Trace) -> bool:
    return _reshape(node, trace) if is_call(node, *RESHAPES) else _RULES[node.target](node, trace)


def _reshape(node: fx.Node, trace: _Trace) -> bool:
    size = shape(node) or ()
    if trace.outer != list(range(len(trace.outer))):
        return False
    count, wanted = len(size), trace.rows.numel()
    product = 1
    while product != wanted or count == len(size):
        count -= 1
        if count < 0 or not isinstance(size[count], int):
            return False
        product *= size[count]
        if product > wanted:
            return False
    while count > len(trace.outer) and size[count - 1] == 1:  # one head: the 1 is a feature dimension
        count -= 1
    trace.rows = trace.rows.reshape([1] * count + list(size[count:]))
    trace.outer = list(range(count))
    given: Any = node.args[1]
    trace.leading = tuple(given[:count])
    return True


def _slice(node: fx.Node, trace: _Trace) -> bool:
    bounds = slice_bounds(node)
    if bounds is None or bounds[0] in trace.outer:
        return False
    dim, start, end, step = bounds
    trace.rows = trace.rows.narrow(dim, start, end - start)
    trace.rows = trace.rows.index_select(dim, torch.arange(0, end - start, step))
    return True


def _pick(node: fx.Node, trace: _Trace) -> bool:
    unbind, index = node.args
    assert isinstance(unbind, fx.Node)
    return _take(trace, int(argument(unbind, "dim")), index)


def _select(node: fx.Node, trace: _Trace) -> bool:
    return _take(trace, int(argument(node, "dim")), argument(node, "index"))


def _take(trace: _Trace, dim: int, index: Any) -> bool:
    dim %= trace.rows.dim()
    if dim in trace.outer or not isinstance(index, int):
        return False
    trace.rows = trace.rows.select(dim, index)
    trace.outer = [d - (d > dim) for d in trace.outer]
    return True


def _permute(node: fx.Node, trace: _Trace) -> bool:
    rank = trace.rows.dim()
    order = list(range(rank))
    given: Any = node.args[1:]
    if is_call(node, aten.permute.default):
        order = [int(d) % rank for d in given[0]]
    else:
        a, b = (int(d) % rank for d in given)
        order[a], order[b] = b, a
    trace.rows = trace.rows.permute(order)
    # Batch and sequence must keep their order among themselves, or the value is another one.
    outer = [order.index(d) for d in trace.outer]
    trace.outer = outer
    return outer == sorted(outer)


def _same(node: fx.Node, trace: _Trace) -> bool:
    return True


_RULES: dict[object, Callable[[fx.Node, _Trace], bool]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.clone.default: _same,
}
