"""Rotary embedding written in primitives becomes `isofold.rotary`.

    x * cos + half(x) * sin,   half(x) = cat(-x[R/2:], x[:R/2])           half-split pairs (i, i + R/2)
                               half(x) = stack(-x[1::2], x[::2]).flatten   interleaved pairs (2i, 2i + 1)

and around it `cat(rotated x[:R], x[R:])` where only a part of each head is turned. Anchor: the sum. The tables
may be anything: the operator multiplies by them column by column. Or, with tables of half the width, part by part:

    a, b = halves of x      cat / stack.flatten (a * cos - b * sin, a * sin + b * cos)

Anchor: the join. That is how products of complex numbers read, too.

Side conditions: R static and even, and the slices exactly the two halves, proved on their bounds; x has the four
dimensions `[B, S, H, D]` or `[B, H, S, D]`, and the tables broadcast over the heads. Exactness: bitwise.
"""

from __future__ import annotations

import torch
from torch import fx

from ..editor import Editor
from ..graph import argument, only_user, shape
from ..passes import Guarantee, define_pass
from .match import (
    MULTIPLICATIONS,
    RESHAPES,
    Product,
    Total,
    aten,
    either_order,
    equal_shapes,
    is_call,
    operands,
    slice_bounds,
    total,
)

_ROTARY = torch.ops.isofold.rotary.default


@define_pass(Guarantee.REAL)
def canonicalize_rotary(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.add.Tensor):
        if argument(node, "alpha") == 1:
            _rotated(editor, node)
    for node in editor.calls(aten.cat.default, aten.flatten.using_ints, *RESHAPES):
        _joined(editor, node)
    for node in editor.calls(_ROTARY):
        _widen_to_head(editor, node)


def _rotated(editor: Editor, node: fx.Node) -> None:
    for straight, crossed in either_order(node):
        if not is_call(straight, *MULTIPLICATIONS) or not is_call(crossed, *MULTIPLICATIONS):
            continue
        for half, sin in either_order(crossed):
            turned = turned_half(half)
            if turned is None:
                continue
            x, interleaved = turned
            cos = next((b for a, b in either_order(straight) if a is x), None)
            if not isinstance(cos, fx.Node) or not isinstance(sin, fx.Node):
                editor.refused(
                    node, "a half-turned value is added to something else than the value times a table"
                )
                return
            _replace(editor, node, x, cos, sin, interleaved)
            return


def _joined(editor: Editor, node: fx.Node) -> None:
    """The two parts of every pair, computed one by one and joined."""
    stack = node if node.target == aten.cat.default else operands(node)[0]
    if not is_call(stack, aten.cat.default, aten.stack.default) or len(operands(stack)[0]) != 2:
        return
    rank, interleaved = len(shape(stack) or ()), stack is not node
    if rank != 4 + interleaved or int(argument(stack, "dim")) % rank != rank - 1:
        return
    first, second = (total(editor, part) for part in operands(stack)[0])
    for plus, minus in (first.terms, first.terms[::-1]) if len(first.terms) == 2 else ():
        # first = a cos - b sin, second = a sin + b cos
        for a, cos in _factors(plus, 1.0):
            for b, sin in _factors(minus, -1.0):
                x = _whole(editor, node, a, b, interleaved)
                if x is None or not _is_sum(second, (a, sin), (b, cos)):
                    continue
                cos, sin = (_doubled(editor, node, table, interleaved) for table in (cos, sin))
                _replace(editor, node, x, cos, sin, interleaved)
                return


def _factors(term: Product, coefficient: float) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors of a term in both orders."""
    if term.coefficient != coefficient or len(term.factors) != 2:
        return []
    return [(term.factors[0], term.factors[1]), (term.factors[1], term.factors[0])]


def _is_sum(read: Total, *products: tuple[fx.Node, fx.Node]) -> bool:
    """Whether a sum is exactly these products."""
    found = [{*term.factors} for term in read.terms if term.coefficient == 1.0 and len(term.factors) == 2]
    return not read.constant and len(read.terms) == 2 and all({*wanted} in found for wanted in products)


def _whole(editor: Editor, node: fx.Node, a: fx.Node, b: fx.Node, interleaved: bool) -> fx.Node | None:
    """x where a and b are the first and the second numbers of its pairs, with the shape of `node`."""
    x = operands(a)[0] if is_call(a, aten.slice.Tensor, aten.select.int) else None
    if not isinstance(x, fx.Node) or a.target != b.target or operands(b)[0] is not x:
        return None
    size = shape(x) or ()
    last = len(size) - 1
    if is_call(a, aten.select.int):
        # Pairs that a reshape made a dimension of.
        places = [(int(operands(part)[1]) % len(size), operands(part)[2]) for part in (a, b)]
        if not interleaved or places != [(last, 0), (last, 1)] or not is_call(x, *RESHAPES) or size[-1] != 2:
            return None
        sizes = [*list(operands(x)[1])[:-2], (shape(node) or ())[-1]]
        if not isinstance(sizes[-1], int) or not equal_shapes(x, operands(node)[0]):
            return None
        return editor.call(aten.reshape.default, operands(x)[0], sizes, like=node)
    width = size[-1]
    if not isinstance(width, int) or width % 2 or not equal_shapes(x, node):
        return None
    wanted = [(last, 0, width, 2), (last, 1, width, 2)]
    if not interleaved:
        wanted = [(last, 0, width // 2, 1), (last, width // 2, width, 1)]
    return x if [slice_bounds(a), slice_bounds(b)] == wanted else None


def _doubled(editor: Editor, node: fx.Node, table: fx.Node, interleaved: bool) -> fx.Node:
    """A table of half the width for both numbers of each pair."""
    if not interleaved:
        return editor.call(aten.cat.default, [table, table], -1, like=node)
    twice = editor.call(aten.stack.default, [table, table], -1, like=node)
    return editor.call(aten.flatten.using_ints, twice, -2, -1, like=node)


def turned_half(node: object) -> tuple[fx.Node, bool] | None:
    """(x, interleaved) where the node is x with each pair (a, b) of its last dimension replaced by (-b, a)."""
    if is_call(node, aten.cat.default) and len(operands(node)[0]) == 2:
        second, first = operands(node)[0]
        dim = int(argument(node, "dim"))
        x = _pair_source(second, first, interleaved=False)
        return (x, False) if x is not None and dim in (-1, len(shape(x) or ()) - 1) else None
    if is_call(node, *RESHAPES, aten.flatten.using_ints):
        stack = operands(node)[0]
        if not is_call(stack, aten.stack.default) or len(operands(stack)[0]) != 2:
            return None
        second, first = operands(stack)[0]
        x = _pair_source(second, first, interleaved=True)
        rank = len(shape(stack) or ())
        if x is not None and int(argument(stack, "dim")) in (-1, rank - 1) and equal_shapes(x, node):
            return x, True
    return None


def _pair_source(second: object, first: object, interleaved: bool) -> fx.Node | None:
    """x where `second` is minus the second halves of its pairs and `first` the first halves."""
    if not is_call(second, aten.neg.default):
        return None
    second = operands(second)[0]
    if not is_call(first, aten.slice.Tensor) or not is_call(second, aten.slice.Tensor):
        return None
    x = operands(first)[0]
    low, high = slice_bounds(first), slice_bounds(second)
    size = (shape(x) or ("",))[-1] if isinstance(x, fx.Node) else ""
    if operands(second)[0] is not x or not isinstance(size, int) or size % 2 or low is None or high is None:
        return None
    assert isinstance(x, fx.Node)
    last = len(shape(x) or ()) - 1
    if interleaved:
        wanted = (last, 0, size, 2), (last, 1, size, 2)
    else:
        wanted = (last, 0, size // 2, 1), (last, size // 2, size, 1)
    return x if (low, high) == wanted else None


def _replace(
    editor: Editor, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool
) -> None:
    if len(shape(x) or ()) != 4:
        editor.refused(node, f"the value has {len(shape(x) or ())} dimensions, rotary embedding takes four")
        return
    tables = [shape(table) or () for table in (cos, sin)]
    width = (shape(x) or ())[-1]
    padded = [(1,) * (4 - len(table)) + tuple(table) for table in tables]
    head = next(
        (d for d in (1, 2) if all(len(t) <= 4 and p[d] == 1 for t, p in zip(tables, padded, strict=True))),
        None,
    )
    if head is None or any(p[-1] != width for p in padded):
        editor.refused(node, f"the tables {tables} do not broadcast over heads at the width {width}")
        return
    for _ in range(4):
        cos, sin = (_unsqueezed(editor, table, node) for table in (cos, sin))
    editor.applied(node, "rotary embedding", interleaved=interleaved, width=width)
    editor.replace(node, editor.call(_ROTARY, x, cos, sin, head, -1, interleaved, like=node))


def _unsqueezed(editor: Editor, table: fx.Node, before: fx.Node) -> fx.Node:
    """One dimension more in front, up to four."""
    if len(shape(table) or ()) >= 4:
        return table
    return editor.call(aten.unsqueeze.default, table, 0, like=table, before=before)


def _widen_to_head(editor: Editor, node: fx.Node) -> None:
    """rotary(x[:R]) next to x[R:] is rotary on x."""
    part, cat = operands(node)[0], only_user(node)
    if not is_call(part, aten.slice.Tensor) or not is_call(cat, aten.cat.default):
        return
    x, pieces = operands(part)[0], operands(cat)[0]
    assert isinstance(x, fx.Node)
    last = len(shape(x) or ()) - 1
    if len(pieces) != 2 or pieces[0] is not node or int(argument(cat, "dim")) not in (-1, last):
        return
    rest, bounds = pieces[1], slice_bounds(part)
    if not is_call(rest, aten.slice.Tensor) or operands(rest)[0] is not x or bounds is None:
        return
    width, size = (shape(part) or ())[-1], (shape(x) or ())[-1]
    if bounds != (last, 0, width, 1) or slice_bounds(rest) != (last, width, size, 1):
        return
    editor.applied(cat, "rotary embedding of a part of each head", width=width)
    editor.replace(cat, editor.call(_ROTARY, x, *operands(node)[1:], like=node, before=cat))
