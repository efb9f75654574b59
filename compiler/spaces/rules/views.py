"""Operators that move values without computing: dimensions are permuted, split, merged, joined, cut, copied.

Atoms follow the indices: a reshape splits or merges them in order, a concatenation makes a direct sum, a slice cuts
one, an expansion adds one of copies (permutations only: all copies are equal). Scales and shifts pass.
"""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]  # it ships no types
import torch
from torch import fx

from ...graph import argument, value
from ..analysis import Analysis, rule, tensors
from ..atoms import Atom, Dim, Group, cut_out, direct_sum

aten = torch.ops.aten


def _same(analysis: Analysis, node: fx.Node, x: fx.Node) -> None:
    analysis.same_scale(node, x)
    analysis.same_shift(node, x)


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default)
def permute(analysis: Analysis, node: fx.Node) -> None:
    """Another order of the dimensions."""
    x = argument(node, "self")
    given = analysis.dims(x)
    order = list(range(len(given)))
    if node.target == aten.permute.default:
        order = [d % len(given) for d in argument(node, "dims")]
    else:
        a, b = (
            (argument(node, "dim0"), argument(node, "dim1"))
            if node.target == aten.transpose.int
            else (-1, -2)
        )
        if len(given) > 1:
            order[a], order[b] = order[b], order[a]
    analysis.dims_of[node] = [given[d] for d in order]
    _same(analysis, node, x)


def _symbol(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@rule(
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.flatten.using_ints, aten.unflatten.int, aten._unsafe_view.default,
)  # fmt: skip
def reshape(analysis: Analysis, node: fx.Node) -> None:
    """The same numbers in order: the dimensions fall into groups of equal size, and each is unified by itself."""
    x = argument(node, "self")
    given, dims = analysis.dims(x), analysis.fresh(node)
    before, after = list(value(x).shape), list(value(node).shape)
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        a = b = sympy.Integer(1)
        while True:
            if a == b and (left or right):
                break
            take_left = j >= len(after) or (i < len(before) and _not_larger(a, b))
            if take_left and i < len(before):
                a, i = a * _symbol(before[i]), i + 1
                left.append(i - 1)
            elif j < len(after):
                b, j = b * _symbol(after[j]), j + 1
                right.append(j - 1)
            else:
                break
        _group(analysis, node, [given[d] for d in left], [dims[d] for d in right])
    analysis.dims_of[node] = dims
    _same(analysis, node, x)


def _not_larger(a: Any, b: Any) -> bool:
    """Which side of a group to extend: the one whose product divides the other's (or is still the empty one)."""
    ratio = sympy.cancel(b / a)
    return bool(ratio.as_numer_denom()[1] == 1)


def _group(analysis: Analysis, node: fx.Node, left: list[Dim], right: list[Dim]) -> None:
    if None not in left and None not in right:
        merged = [tuple(ref for dim in side for ref in dim or ()) for side in (left, right)]
        analysis.tie(node, merged[0], merged[1])
        return
    static = [d for d in (*left, *right) if d]
    analysis.allow(node, static, Group.NONE, "a view that mixes it with a dimension of unknown size")


@rule(aten.expand.default)
def expand(analysis: Analysis, node: fx.Node) -> None:
    """Copies along new dimensions."""
    x = argument(node, "self")
    given, dims = analysis.dims(x), analysis.fresh(node)
    shift = len(dims) - len(given)
    for index in range(len(dims)):
        at = index - shift
        if at >= 0 and str(value(x).shape[at]) == str(value(node).shape[index]):
            dims[index] = given[at]
        else:
            analysis.allow(node, [dims[index]], Group.PERMUTATION, "copies of one value")
    analysis.dims_of[node] = dims
    _same(analysis, node, x)


def _with_atom(analysis: Analysis, part: fx.Node, at: int) -> Dim:
    """The dimension along which a part is joined; one of a single index gets an atom, to be told from the others."""
    if analysis.dims(part)[at] == ():
        dims = list(analysis.dims(part))
        dims[at] = ((Atom(1), 1),)
        analysis.dims_of[analysis.constant(part)] = dims
    return analysis.dims(part)[at]


@rule(aten.cat.default)
def cat(analysis: Analysis, node: fx.Node) -> None:
    """A direct sum along one dimension."""
    parts = [p for p in node.args[0] if isinstance(p, fx.Node)]  # type: ignore[union-attr]  # a list of nodes
    rank = len(value(node).shape)
    at = int(argument(node, "dim")) % rank
    dims = analysis.fresh(node)
    joined = [_with_atom(analysis, p, at) for p in parts]
    for part in parts:
        for index in range(rank):
            if index != at:
                analysis.tie(node, dims[index], analysis.dims(part)[index])
        _same(analysis, node, part)
    if any(d is None for d in joined) or dims[at] is None:
        analysis.allow(node, [d for d in joined if d], Group.NONE, "joined with a part of unknown size")
        dims[at] = None
    else:
        dims[at] = direct_sum([d or () for d in joined])
    analysis.dims_of[node] = dims


@rule(aten.slice.Tensor, aten.narrow.default)
def cut(analysis: Analysis, node: fx.Node) -> None:
    """A part of one dimension: the atom is cut there."""
    x = argument(node, "self")
    given = list(analysis.dims(x))
    at = int(argument(node, "dim")) % len(given)
    whole, size = given[at], value(x).shape[at]
    dims = list(given)
    part: Dim = None
    if whole is not None and isinstance(size, int):
        start, end, step = (argument(node, name) for name in ("start", "end", "step"))
        start, end = 0 if start is None else start, size if end is None else end
        if all(isinstance(v, int) for v in (start, end, step)) and step == 1:
            start, end = (min(max(v + size if v < 0 else v, 0), size) for v in (start, end))
            part = whole if (start, end) == (0, size) else cut_out(whole, start, end)
        if part is None:
            analysis.allow(node, [whole], Group.NONE, "a slice that is no block")
            part = analysis.fresh(node)[at]
            analysis.allow(node, [part], Group.NONE, "a slice that is no block")
            for side in (x, node):
                analysis.pin_scale(node, side, "a slice that is no block")
                analysis.pin_shift(node, side, "a slice that is no block")
        dims[at] = part
    else:
        dims[at] = analysis.fresh(node)[at]
        analysis.allow(node, [dims[at]], Group.NONE, "a part of a dimension of unknown size")
    analysis.dims_of[node] = dims
    _same(analysis, node, x)


@rule(aten.select.int)
def select(analysis: Analysis, node: fx.Node) -> None:
    """One index of a dimension, which is pinned."""
    x = argument(node, "self")
    given = list(analysis.dims(x))
    at = int(argument(node, "dim")) % len(given)
    analysis.allow(node, [given[at]], Group.NONE, "one index of it is taken")
    analysis.dims_of[node] = [d for i, d in enumerate(given) if i != at]
    _same(analysis, node, x)


@rule(aten.stack.default)
def stack(analysis: Analysis, node: fx.Node) -> None:
    """A new dimension, pinned."""
    parts = [p for p in node.args[0] if isinstance(p, fx.Node)]  # type: ignore[union-attr]  # a list of nodes
    dims = analysis.fresh(node)
    at = int(argument(node, "dim")) % len(dims)
    analysis.allow(node, [dims[at]], Group.NONE, "one index for each value that is stacked")
    rest = [d for i, d in enumerate(dims) if i != at]
    for part in parts:
        for mine, theirs in zip(rest, analysis.dims(part), strict=True):
            analysis.tie(node, mine, theirs)
        _same(analysis, node, part)
    analysis.dims_of[node] = dims


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(analysis: Analysis, node: fx.Node) -> None:
    """Padded dimensions are pinned; the others pass scales where zeros are added."""
    x = tensors(node)[0]
    given, dims = analysis.dims(x), analysis.fresh(node)
    widths = list(argument(node, "pad"))
    padded = {len(given) - 1 - i // 2 for i, w in enumerate(widths) if not (isinstance(w, int) and w == 0)}
    for index in range(len(given)):
        if index in padded:
            analysis.allow(node, [given[index], dims[index]], Group.NONE, "it is padded")
        else:
            dims[index] = given[index]
    analysis.dims_of[node] = dims
    zero = argument(node, "value") in (0, 0.0, None) and (
        node.target != aten.pad.default or argument(node, "mode") == "constant"
    )
    if zero:
        analysis.same_scale(node, x)
    else:
        analysis.allow(node, dims, Group.PERMUTATION, "padding with a number")
    for side in (x, node):
        analysis.pin_shift(node, side, "padding adds zeros")
        if not zero:
            analysis.pin_scale(node, side, "padding with a number")


@rule(aten.repeat_interleave.self_int)
def repeat(analysis: Analysis, node: fx.Node) -> None:
    """Every index of one dimension several times in turn: that dimension is pinned."""
    x, at = argument(node, "self"), argument(node, "dim")
    given, dims = analysis.dims(x), analysis.fresh(node)
    if at is None:
        analysis.pin(node, x, "repeated as one dimension")
        analysis.dims_of[node] = dims
        analysis.pin(node, node, "repeated as one dimension")
        return
    at = int(at) % len(given)
    analysis.allow(node, [given[at], dims[at]], Group.NONE, "its entries are repeated")
    analysis.dims_of[node] = [*given[:at], dims[at], *given[at + 1 :]]
    _same(analysis, node, x)


@rule(aten.index.Tensor, aten.index_select.default, aten.gather.default)
def index(analysis: Analysis, node: fx.Node) -> None:
    """Rows chosen by ids: what is not indexed passes."""
    x = argument(node, "self")
    given, dims = analysis.dims(x), analysis.fresh(node)
    chosen = argument(node, "indices") if node.target == aten.index.Tensor else None
    for operand in tensors(node):
        if operand is not x:
            analysis.pin(node, operand, "ids")
    leading = chosen is not None and len(chosen) == 1 and chosen[0] is not None
    if not leading or not isinstance(x, fx.Node):
        analysis.pin(node, x, "indexed in several dimensions")
        analysis.dims_of[node] = dims
        analysis.pin(node, node, "indexed in several dimensions")
        return
    analysis.allow(node, [given[0]], Group.NONE, "rows are chosen by ids")
    rest = given[1:]
    analysis.dims_of[node] = [*dims[: len(dims) - len(rest)], *rest]
    analysis.allow(node, dims[: len(dims) - len(rest)], Group.NONE, "rows are chosen by ids")
    _same(analysis, node, x)
