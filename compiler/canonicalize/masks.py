"""Attention masks in their smallest form: none, `is_causal`, or a mask without broadcast copies.

The mask's formula at (batch, head, query, key) is found by `closed_form`. Where it is always true the mask goes;
where it is `key <= query` it becomes `is_causal=True`; where some coordinates do not occur it is rebuilt from what
does, with size one in their place. An additive mask `where(m, bias, low)` is treated through its m.

Side conditions: the formula is proved for all sizes; a causal mask is dropped from an additive one only where its
bias is 0 and low so low that its weight is zero, which is safe as every query sees key 0. A boolean mask may
leave a query without any key, and keeps its meaning there. Exactness: real.
"""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]  # it ships no types
import torch
from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape, value
from ..passes import Guarantee, define_pass
from .attention import SDPA
from .closed_form import ClosedForms, at_most_zero, conjuncts, coordinate
from .match import aten, equal_shapes, equal_sizes, is_call, operands, scalar

_LOW = -1e18


@define_pass(Guarantee.REAL)
def simplify_masks(editor: Editor) -> None:
    """See the module."""
    forms = ClosedForms(editor)
    made: dict[fx.Node, fx.Node | None] = {}
    for node in editor.calls(SDPA):
        mask = argument(node, "attn_mask")
        if isinstance(mask, fx.Node) and not argument(node, "is_causal"):
            _simplify(editor, forms, made, node, mask)


def _simplify(
    editor: Editor, forms: ClosedForms, made: dict[fx.Node, fx.Node | None], node: fx.Node, mask: fx.Node
) -> None:
    found = visible(mask)
    if found is None:
        return
    keep, positive, bias, low = found
    scores = _scores_shape(node)
    if scores is None:
        return
    formula = forms.as_operand(keep, _like_scores(keep, mask))
    formula = _in_scores(formula, len(shape(mask) or ()))
    formula = formula if positive else sympy.Not(formula)
    plain = bias is None or (scalar(editor, bias) == 0.0 and low <= _LOW)
    if formula == sympy.true and (bias is None or scalar(editor, bias) == 0.0):
        _set(editor, node, None, False, "mask is always true: dropped")
    elif plain and is_causal(formula):
        _set(editor, node, None, True, "mask is key <= query: is_causal")
    else:
        rebuilt = _rebuild(editor, forms, formula, scores, node, mask)
        if rebuilt is None or equal_shapes(rebuilt, keep):
            return
        if bias is not None:
            rebuilt = editor.call(aten.where.ScalarOther, rebuilt, bias, low, like=mask, before=node)
        _set(
            editor, node, rebuilt, False, f"mask without broadcast copies: {_text(mask)} -> {_text(rebuilt)}"
        )


def visible(mask: fx.Node) -> tuple[fx.Node, bool, fx.Node | None, float] | None:
    """(m, whether true means visible, bias, low) of a boolean mask or of `where(m, bias, low)`."""
    if dtype(mask) == torch.bool:
        return mask, True, None, 0.0
    if is_call(mask, aten.where.ScalarOther) and isinstance(operands(mask)[1], fx.Node):
        return operands(mask)[0], True, operands(mask)[1], float(operands(mask)[2])
    if is_call(mask, aten.masked_fill.Scalar) and isinstance(operands(mask)[1], fx.Node):
        return operands(mask)[1], False, operands(mask)[0], float(operands(mask)[2])
    return None


def is_causal(formula: Any) -> bool:
    """Whether the formula at (c0, c1, c2, c3) is c3 <= c2."""
    return bool(at_most_zero(formula) == coordinate(3) - coordinate(2))


def _scores_shape(node: fx.Node) -> tuple[Any, ...] | None:
    q, k = shape(argument(node, "query")), shape(argument(node, "key"))
    return None if q is None or k is None or len(q) != 4 else (q[0], q[1], q[2], k[2])


def _like_scores(keep: fx.Node, mask: fx.Node) -> fx.Node:
    return mask if len(shape(mask) or ()) >= len(shape(keep) or ()) else keep


def _in_scores(formula: Any, rank: int) -> Any:
    mapping = {coordinate(d): coordinate(d + 4 - rank) for d in range(rank)}
    return formula.xreplace(mapping)


def _set(editor: Editor, node: fx.Node, mask: fx.Node | None, causal: bool, what: str) -> None:
    old = argument(node, "attn_mask")
    node.args = (*operands(node)[:3], mask, argument(node, "dropout_p"), causal)
    editor.applied(node, what)
    if not old._erased and not old.users:
        editor.erase(old)


def _text(node: fx.Node) -> str:
    return str([str(size) for size in shape(node) or ()])


def _rebuild(
    editor: Editor, forms: ClosedForms, formula: Any, scores: tuple[Any, ...], node: fx.Node, like: fx.Node
) -> fx.Node | None:
    """A boolean mask `[B|1, H|1, S|1, T|1]` of the formula, or None where a part of it has no rebuilding rule."""
    parts: list[fx.Node] = []
    for part in conjuncts(formula):
        built = _element(editor, forms, part, scores, node, like) or _comparison(
            editor, part, scores, node, like
        )
        if built is None:
            return None
        parts.append(built)
    result = parts[0]
    for part in parts[1:]:
        result = editor.call(aten.__and__.Tensor, result, part, like=like, before=node)
    return result


def _element(
    editor: Editor, forms: ClosedForms, part: Any, scores: tuple[Any, ...], node: fx.Node, like: fx.Node
) -> fx.Node | None:
    """An element of an opaque tensor at distinct coordinates in ascending order, with ones between."""
    negated = isinstance(part, sympy.Eq)
    if (
        not isinstance(part, (sympy.Ne, sympy.Eq))
        or part.rhs != 0
        or part.lhs.func.__name__ not in forms.opaque
    ):
        return None
    source = forms.opaque[part.lhs.func.__name__]
    at = {coordinate(d): d for d in range(4)}
    sizes = shape(source) or ()
    dims = [at.get(a) for a, size in zip(part.lhs.args, sizes, strict=True) if a != 0]
    kept = [size for a, size in zip(part.lhs.args, sizes, strict=True) if a != 0]
    known = [d for d in dims if d is not None]
    if len(known) != len(dims) or known != sorted(set(known)) or dtype(source) != torch.bool:
        return None
    if any(a == 0 and size != 1 for a, size in zip(part.lhs.args, sizes, strict=True)):
        return None
    if not all(equal_sizes(size, scores[d]) for d, size in zip(known, kept, strict=True)):
        return None
    built = source
    for position in reversed([i for i, a in enumerate(part.lhs.args) if a == 0]):
        built = editor.call(aten.squeeze.dim, built, position, like=like, before=node)
    for d in range(4):
        if d not in known:
            built = editor.call(aten.unsqueeze.default, built, d, like=like, before=node)
    return editor.call(aten.bitwise_not.default, built, like=like, before=node) if negated else built


def _comparison(
    editor: Editor, part: Any, scores: tuple[Any, ...], node: fx.Node, like: fx.Node
) -> fx.Node | None:
    """key <= query + number, or query <= key + number (a window), from two ranges."""
    difference = at_most_zero(part)
    if difference is None:
        return None
    query, key = coordinate(2), coordinate(3)
    ahead, behind = (-(difference - sign * (key - query)) for sign in (1, -1))
    offset = ahead if ahead.is_Integer else behind
    if not offset.is_Integer:
        return None
    rows, columns = (_range(editor, size, argument(node, name), like, node) for size, name in
                     ((scores[2], "query"), (scores[3], "key")))  # fmt: skip
    rows = editor.call(aten.unsqueeze.default, rows, 1, like=like, before=node)
    low, high = (columns, rows) if ahead.is_Integer else (rows, columns)
    if offset != 0:
        high = editor.call(aten.add.Tensor, high, int(offset), like=like, before=node)
    compared = editor.call(aten.le.Tensor, low, high, like=like, before=node)
    for _ in range(2):
        compared = editor.call(aten.unsqueeze.default, compared, 0, like=like, before=node)
    return compared


def _range(editor: Editor, size: Any, of: fx.Node, like: fx.Node, node: fx.Node) -> fx.Node:
    return editor.call(aten.arange.default, _length(editor, size, of, like, node), like=like, before=node)


def _length(editor: Editor, size: Any, of: fx.Node, like: fx.Node, node: fx.Node) -> Any:
    """The size as a number, or the first node of the graph that computes it."""
    if isinstance(size, int):
        return size
    for known in editor.graph.nodes:
        if known is node:
            break
        if isinstance(value(known), torch.SymInt) and equal_sizes(value(known), size):
            return known
    return editor.call(aten.sym_size.int, of, 2, like=like, before=node)
