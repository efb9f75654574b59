"""Attention written out becomes `aten.scaled_dot_product_attention`.

    softmax(q k^T * scale + bias, masked) v

Anchor: a softmax over the last dimension whose weights only multiply the values. Between the two products there
may be scalings, added biases, `masked_fill` and `where` with a low constant, and casts. The result always
spells its arguments the same way: (q, k, v, mask, 0.0, is_causal), scale as a number, enable_gqa. A number that
multiplies q or k alone moves into the scale. Operands of three dimensions, or of five and more, become four: heads of
one, or leading dimensions joined.

Side conditions: the weights are read by the product with the values only; masking comes after every scaling (an
added bias may be scaled with the scores);
what masked positions are filled with is so low that their weight is zero and that adding a score to it changes
nothing (below -1e18): then a row without any visible key keeps its uniform weights too. A soft cap
(`c tanh(s / c)`) has no place in the operator and is refused. Exactness: real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, only_user, shape
from ..passes import Guarantee, define_pass
from .match import (
    ADDITIONS,
    DIVISIONS,
    MULTIPLICATIONS,
    RESHAPES,
    aten,
    either_order,
    equal_sizes,
    is_call,
    is_last,
    operands,
    scalar,
    uncast,
)

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_LOW = -1e18


@dataclass
class Scores:
    """softmax's input, read down to q k^T: scale, then additions and masks in the order they are applied.

    A step is ("add", bias, its factor), ("keep", mask, low) or ("fill", mask, low).
    """

    q: fx.Node
    k_transposed: fx.Node
    scale: float = 1.0
    steps: list[tuple[str, Any, float]] = field(default_factory=list)


@define_pass(Guarantee.REAL)
def canonicalize_attention(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(*_SOFTMAXES):
        _written_out(editor, node)
    for node in editor.calls(SDPA):
        _spell(editor, node)


def _written_out(editor: Editor, softmax: fx.Node) -> None:
    if not is_last(softmax, argument(softmax, "dim")):
        return
    weights = softmax
    user = only_user(weights)
    if user is not None and uncast(user) is weights and user is not weights:
        weights, user = user, only_user(user)
    if not is_call(user, *_PRODUCTS) or operands(user)[0] is not weights:
        multiplied = any(is_call(u, *_PRODUCTS) and operands(u)[0] is weights for u in weights.users)
        if multiplied:
            editor.refused(
                softmax, "its weights are also read by something else than the product with the values"
            )
        return
    scores = _read_scores(editor, operands(softmax)[0])
    if isinstance(scores, str):
        editor.refused(softmax, scores)
        return
    value = operands(user)[1]
    ranks = {
        len(shape(n) or ()) for n in (scores.q, scores.k_transposed, value, user) if isinstance(n, fx.Node)
    }
    if len(ranks) != 1 or min(ranks) < 3:
        editor.refused(softmax, "queries, keys and values have different numbers of dimensions")
        return
    grouped = _grouped(scores, value, softmax)
    if isinstance(grouped, str):
        editor.refused(softmax, grouped)
        return
    mask = _mask(editor, scores, softmax)
    k = editor.call(aten.transpose.int, scores.k_transposed, -2, -1, like=softmax, before=user)
    editor.applied(softmax, "attention", mask=mask is not None, scale=scores.scale)
    new = editor.call(
        SDPA,
        scores.q,
        k,
        value,
        mask,
        0.0,
        False,
        scale=scores.scale,
        enable_gqa=grouped,
        like=softmax,
        before=user,
    )
    editor.replace(user, new)


def _grouped(scores: Scores, value: fx.Node, softmax: fx.Node) -> bool | str:
    """False where all have the queries' heads, True where keys and values have one head, else what broadcasts."""
    q, k, v, weights = (shape(n) or () for n in (scores.q, scores.k_transposed, value, softmax))
    if not _equal(weights, (*q[:-1], k[-1])) and _equal(q[:-2], k[:-2]):
        return "a bias or mask is larger than the scores it is added to"
    if _equal(q[:-2], k[:-2]) and _equal(q[:-2], v[:-2]):
        return False
    one = len(q) == 4 and k[1] == 1 and v[1] == 1 and equal_sizes(q[0], k[0]) and equal_sizes(q[0], v[0])
    fits = one and _equal(weights, (*q[:-1], k[-1]))
    return True if fits else "queries, keys and values are broadcast against each other"


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(equal_sizes(x, y) for x, y in zip(a, b, strict=True))


def _read_scores(editor: Editor, node: object) -> Scores | str:
    """Read from the softmax down to q k^T, or say what stands in the way."""
    node = uncast(node)
    if not isinstance(node, fx.Node):
        return "its input is no tensor"
    if is_call(node, *_PRODUCTS):
        q, k_transposed = operands(node)[:2]
        assert isinstance(q, fx.Node)
        assert isinstance(k_transposed, fx.Node)
        return Scores(q, k_transposed)
    if len(node.users) != 1:
        return "the scores are also read by something else than the softmax"
    if is_call(node, *MULTIPLICATIONS, *DIVISIONS):
        return _read_scaling(editor, node)
    if is_call(node, *ADDITIONS) and argument(node, "alpha") == 1:
        reason = "no product of queries and keys leads to it"
        for inner, bias in either_order(node):
            if isinstance(bias, fx.Node) and _leads_to_product(inner):
                read = _read_scores(editor, inner)
                if not isinstance(read, str):
                    read.steps.append(_added(editor, bias))
                    return read
                reason = read
        return reason
    if is_call(node, aten.masked_fill.Scalar, aten.where.ScalarOther):
        filled = is_call(node, aten.masked_fill.Scalar)
        inner, mask = (
            (operands(node)[0], operands(node)[1]) if filled else (operands(node)[1], operands(node)[0])
        )
        low = float(operands(node)[2])
        return _read_masking(editor, inner, mask, low, "fill" if filled else "keep")
    if is_call(node, aten.where.self, aten.masked_fill.Tensor):
        filled = is_call(node, aten.masked_fill.Tensor)
        inner, mask = (
            (operands(node)[0], operands(node)[1]) if filled else (operands(node)[1], operands(node)[0])
        )
        number = scalar(editor, operands(node)[2])
        if number is None:
            return "masked scores are replaced by something that is not one number"
        return _read_masking(editor, inner, mask, number, "fill" if filled else "keep")
    if is_call(node, aten.tanh.default):
        return "the scores are soft-capped, which the operator cannot say"
    if is_call(node, *RESHAPES):
        return "the scores change shape between the product and the softmax"
    return f"{node.target} stands between the product of queries and keys and the softmax"


def _added(editor: Editor, bias: fx.Node) -> tuple[str, fx.Node, float]:
    """An added `where(m, 0, low)` is masking by m, because low absorbs every score."""
    if is_call(bias, aten.where.ScalarOther, aten.where.Scalar, aten.where.self, aten.where.ScalarSelf):
        mask, chosen, other = operands(bias)
        kept, filled = scalar(editor, chosen), scalar(editor, other)
        if kept == 0.0 and filled is not None and filled <= _LOW:
            return "keep", mask, filled
        if filled == 0.0 and kept is not None and kept <= _LOW:
            return "fill", mask, kept
    return "add", bias, 1.0


def _leads_to_product(node: object) -> bool:
    """Whether a product of activations is reached through what `_read_scores` looks through."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_call(node, *_PRODUCTS):
            return True
        if is_call(node, aten.where.self, aten.where.ScalarOther):
            node = operands(node)[1]
        elif is_call(node, *MULTIPLICATIONS, *ADDITIONS):
            return any(_leads_to_product(operand) for operand in operands(node)[:2])
        elif is_call(
            node, *DIVISIONS, aten.tanh.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, *RESHAPES
        ):
            node = operands(node)[0]
        else:
            following = uncast(node)
            if following is node:
                return False
            node = following
    return False


def _read_scaling(editor: Editor, node: fx.Node) -> Scores | str:
    orders = either_order(node) if is_call(node, *MULTIPLICATIONS) else iter([operands(node)[:2]])
    for inner, factor in orders:
        number = scalar(editor, factor)
        if number is None or not number:
            continue
        read = _read_scores(editor, inner)
        if isinstance(read, str):
            return read
        if any(step != "add" for step, _, _ in read.steps):
            return "the scores are scaled after a mask was applied"
        factor_of_scores = number if is_call(node, *MULTIPLICATIONS) else 1.0 / number
        read.scale *= factor_of_scores
        # s (q k + b) = s q k + s b
        read.steps = [(step, bias, by * factor_of_scores) for step, bias, by in read.steps]
        return read
    return "the scores are multiplied by a tensor"


def _read_masking(editor: Editor, inner: object, mask: object, low: float, kind: str) -> Scores | str:
    if low > _LOW:
        return f"masked scores become {low:g}, where a score still counts"
    read = _read_scores(editor, inner)
    if not isinstance(read, str):
        read.steps.append((kind, mask, low))
    return read


def _mask(editor: Editor, scores: Scores, anchor: fx.Node) -> fx.Node | None:
    """One additive mask of all the steps, in the type of the queries."""
    mask: fx.Node | None = None
    kind = dtype(scores.q)
    for step, operand, low in scores.steps:
        if step == "add":
            operand = uncast(operand) if dtype(uncast(operand)) == kind else operand
            operand = operand if low == 1.0 else editor.call(aten.mul.Tensor, operand, low, like=anchor)
            mask = operand if mask is None else editor.call(aten.add.Tensor, mask, operand, like=anchor)
            continue
        if mask is None:
            mask = editor.call(aten.zeros.default, [], dtype=kind, like=anchor)
        if step == "keep":
            mask = editor.call(aten.where.ScalarOther, operand, mask, low, like=anchor)
        else:
            mask = editor.call(aten.masked_fill.Scalar, mask, operand, low, like=anchor)
    if mask is not None and dtype(mask) != kind:
        mask = editor.call(aten._to_copy.default, mask, dtype=kind, like=anchor)
    return mask


def _spell(editor: Editor, node: fx.Node) -> None:
    """One spelling of the arguments; scales on q and k move into the operator's."""
    q, k, v, mask, dropout, causal, scale, grouped = (
        argument(node, name)
        for name in ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    )
    width = (shape(q) or (None,))[-1]
    if dropout or not isinstance(width, int):
        editor.refused(node, "it drops weights at random" if dropout else "its head has no static size")
        return
    factor = 1.0 / math.sqrt(width) if scale is None else float(scale)
    # A value that is also read as another operand keeps its factor: one scale cannot stand for both.
    q, q_factor = _unscaled(editor, q, node) if q is not k and q is not v else (q, 1.0)
    k, k_factor = _unscaled(editor, k, node) if k is not q and k is not v else (k, 1.0)
    if q_factor * k_factor != 1.0:
        editor.applied(
            node, f"queries and keys were scaled by {q_factor * k_factor:g}: now the operator's scale"
        )
    node.args = (q, k, v, mask, 0.0, bool(causal))
    node.kwargs = {"scale": factor * q_factor * k_factor, "enable_gqa": bool(grouped)}
    if len(shape(q) or ()) != 4:
        _as_four(editor, node)


def _as_four(editor: Editor, node: fx.Node) -> None:
    """Operands of another rank as `[batch, heads, tokens, size]`, which ONNX's translation and kernels know."""
    q, k, v, mask = node.args[:4]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    sizes = shape(q) or ()
    masked = shape(mask) if isinstance(mask, fx.Node) else None
    if len(sizes) < 3 or (masked is not None and len(masked) > 2 and not _equal(masked[:-2], sizes[:-2])):
        editor.refused(
            node, "its operands have fewer than three dimensions, or its mask is broadcast over some"
        )
        return
    if node.kwargs["enable_gqa"] and len(sizes) != 4:
        editor.refused(node, "its queries are grouped over a dimension that is not the second of four")
        return

    def call(target: Any, *given: Any, **options: Any) -> fx.Node:
        return editor.call(target, *given, like=node, before=node, **options)

    def extent(x: fx.Node, dim: int) -> Any:
        size = (shape(x) or ())[dim]
        return size if isinstance(size, int) else call(aten.sym_size.int, x, dim)

    def lifted(x: fx.Node) -> fx.Node:
        if len(shape(x) or ()) == 3:
            return call(aten.unsqueeze.default, x, 1)
        rank = len(shape(x) or ())
        return call(aten.reshape.default, x, [-1, *(extent(x, d) for d in range(rank - 3, rank))])

    if masked is not None and len(masked) > 2:
        assert isinstance(mask, fx.Node)
        mask = lifted(mask)
    new = call(SDPA, lifted(q), lifted(k), lifted(v), mask, *node.args[4:], **node.kwargs)
    if len(sizes) == 3:
        back = call(aten.squeeze.dim, new, 1)
    else:
        lead = [extent(q, d) for d in range(len(sizes) - 1)]
        back = call(aten.reshape.default, new, [*lead, extent(v, len(sizes) - 1)])
    editor.applied(node, f"{len(sizes)} dimensions as four")
    editor.replace(node, back)


def _unscaled(editor: Editor, node: fx.Node, attention: fx.Node) -> tuple[fx.Node, float]:
    """Take a product with a number off the end of a chain of views that only this attention reads."""
    chain: list[fx.Node] = []
    inner = node
    while is_call(inner, *RESHAPES, aten.transpose.int, aten.permute.default) and len(inner.users) == 1:
        chain.append(inner)
        inner = operands(inner)[0]
    if not is_call(inner, aten.mul.Tensor, aten.div.Tensor) or len(inner.users) != 1:
        return node, 1.0
    pairs = either_order(inner) if is_call(inner, aten.mul.Tensor) else iter([operands(inner)[:2]])
    for x, factor in pairs:
        number = scalar(editor, factor)
        if number is None or not number or not isinstance(x, fx.Node) or shape(x) != shape(inner):
            continue
        inner.replace_all_uses_with(x, propagate_meta=False)
        editor.erase(inner)
        scale = number if inner.target is aten.mul.Tensor else 1.0 / number
        return (x if not chain else node), scale
    return node, 1.0
