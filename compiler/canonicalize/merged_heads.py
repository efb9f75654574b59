"""Attention over batch and heads merged into one dimension keeps them apart.

    softmax(reshape(bmm(q, k) + b, [B, H, S, T]))  →  softmax(matmul(q', k') + b')
    bmm(reshape(w, [B H, S, T]), v)                →  reshape(matmul(w, v'), [B H, S, D])

with q', k', b', v' the same values as `[B, H, ...]`, which undoes the reshapes they were merged by; attention and
masks are then read in four dimensions. `baddbmm(b, q, k)` is `beta b + alpha bmm(q, k)`. Anchor: a softmax.

Side conditions: the reshape splits or merges the first dimension alone, proved on the symbolic sizes; what stands
between the product and the softmax has one reader and works element by element; the sizes that a new reshape
names are static but for one. Exactness: bitwise, but for the sum inside baddbmm.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..editor import Editor
from ..graph import argument, only_user, shape
from ..passes import Guarantee, define_pass
from .match import ADDITIONS, DIVISIONS, MULTIPLICATIONS, RESHAPES, aten, equal_sizes, is_call, operands

_SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_ELEMENTWISE = (*ADDITIONS, *MULTIPLICATIONS, *DIVISIONS)


@define_pass(Guarantee.REAL)
def split_merged_heads(editor: Editor) -> None:
    """See the module."""
    for softmax in editor.calls(*_SOFTMAXES):
        if len(shape(softmax) or ()) != 4:
            continue
        for reshape in _reshapes_above(operands(softmax)[0]):
            if _splits_first(operands(reshape)[0], reshape):
                _push_up(editor, reshape)
        _push_down(editor, softmax)


def _reshapes_above(node: object) -> list[fx.Node]:
    """Reshapes to four dimensions on the way up from the softmax."""
    found: list[fx.Node] = []
    pending = [node]
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or len(shape(node) or ()) != 4 or len(node.users) != 1:
            continue
        if is_call(node, *RESHAPES):
            found.append(node)
        elif is_call(node, *_ELEMENTWISE):
            pending.extend(operands(node)[:2])
    return found


def _splits_first(three: object, four: fx.Node) -> bool:
    """Whether `[N, S, T]` becomes `[B, H, S, T]` (or the reverse): equal sizes behind the first dimensions."""
    small = (shape(three) or ()) if isinstance(three, fx.Node) else ()
    large = shape(four) or ()
    if len(small) != 3 or len(large) != 4:
        return False
    return equal_sizes(small[1], large[2]) and equal_sizes(small[2], large[3])


def _push_up(editor: Editor, reshape: fx.Node) -> None:
    """The reshape of a product, or of elementwise work on one, becomes reshapes of what goes into the product."""
    inner = operands(reshape)[0]
    if len(inner.users) != 1 or not _ends_in_product(inner):
        return
    heads = list(operands(reshape)[1])[:2]
    new = _as_four(editor, inner, heads, reshape)
    if new is None:
        return
    editor.applied(reshape, "scores of merged batch and heads keep them apart")
    editor.replace(reshape, new)


def _ends_in_product(node: object) -> bool:
    if is_call(node, aten.bmm.default, aten.baddbmm.default):
        return True
    if not is_call(node, *_ELEMENTWISE) or len(node.users) != 1:
        return False
    return any(_ends_in_product(operand) for operand in operands(node)[:2])


def _as_four(editor: Editor, node: Any, heads: list[Any], at: fx.Node) -> Any:
    """The value of a `[B H, ...]` node as `[B, H, ...]`; None where a size cannot be named."""
    if not isinstance(node, fx.Node):
        return node
    if is_call(node, aten.bmm.default) and len(node.users) == 1:
        sides = [_split(editor, operand, heads, at) for operand in operands(node)[:2]]
        return None if None in sides else editor.call(aten.matmul.default, *sides, like=node, before=at)
    if is_call(node, aten.baddbmm.default) and len(node.users) == 1:
        bias, *factors = (_split(editor, operand, heads, at) for operand in operands(node)[:3])
        if bias is None or None in factors:
            return None
        product = editor.call(aten.matmul.default, *factors, like=node, before=at)
        alpha, beta = argument(node, "alpha"), argument(node, "beta")
        if alpha != 1:
            product = editor.call(aten.mul.Tensor, product, alpha, like=node, before=at)
        if beta != 1:
            bias = editor.call(aten.mul.Tensor, bias, beta, like=node, before=at)
        return editor.call(aten.add.Tensor, product, bias, like=node, before=at)
    if is_call(node, *_ELEMENTWISE) and len(node.users) == 1 and _ends_in_product(node):
        sides = [_as_four(editor, operand, heads, at) for operand in operands(node)[:2]]
        rest = operands(node)[2:]
        made = None in sides
        return None if made else editor.call(node.target, *sides, *rest, like=node, before=at, **node.kwargs)
    return _split(editor, node, heads, at)


def _split(editor: Editor, node: Any, heads: list[Any], at: fx.Node) -> fx.Node | None:
    """reshape(`[B H, a, b]`, [B, H, a, b]), one of a and b possibly dynamic."""
    sizes = shape(node) if isinstance(node, fx.Node) else None
    if not sizes or len(sizes) != 3 or equal_sizes(sizes[0], 1):
        return None
    last = [size if isinstance(size, int) else -1 for size in sizes[1:]]
    if last.count(-1) > 1:
        return None
    return editor.call(aten.reshape.default, node, [*heads, *last], like=node, before=at)


def _push_down(editor: Editor, softmax: fx.Node) -> None:
    """The weights meet the values before batch and heads are merged."""
    merged = only_user(softmax)
    product = only_user(merged) if is_call(merged, *RESHAPES) else None
    if merged is None or not _splits_first(merged, softmax):
        return
    if not is_call(product, aten.bmm.default) or operands(product)[0] is not merged:
        return
    batch, heads = (
        size
        if isinstance(size, int)
        else editor.call(aten.sym_size.int, softmax, at, like=merged, before=product)
        for at, size in enumerate((shape(softmax) or ())[:2])
    )
    values = _split(editor, operands(product)[1], [batch, heads], product)
    width = (shape(product) or ())[-1]
    if values is None or not isinstance(width, int):
        return
    new = editor.call(aten.matmul.default, softmax, values, like=product, before=product)
    sizes = [*list(operands(merged)[1])[:2], width]
    editor.applied(product, "weights of merged batch and heads keep them apart")
    editor.replace(product, editor.call(aten.reshape.default, new, sizes, like=product, before=product))
