"""Keys and values repeated over their query heads become `enable_gqa=True` of the attention operator.

    reshape(expand(unsqueeze(k, 2), [B, G, r, T, D]), [B, G r, T, D]),  repeat_interleave(k, r, 1),  expand(one head)

all say that query head h reads key head h // r (in front of a transpose of heads and sequence, too), and so does
`enable_gqa` (Ainslie et al., arXiv 2305.13245).

Side conditions: keys and values are repeated alike; the repetition runs over the dimension right behind the heads
(repeating whole blocks, `k.repeat`, would pair head h with h % G and is refused). Exactness: bitwise.
"""

from __future__ import annotations

from torch import fx

from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .attention import SDPA
from .match import RESHAPES, aten, equal_sizes, is_call, operands, permutation


@define_pass(Guarantee.REAL)
def absorb_grouped_queries(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(SDPA):
        k, v = argument(node, "key"), argument(node, "value")
        if argument(node, "enable_gqa"):
            continue
        single_k, single_v = _single(editor, k), _single(editor, v)
        if single_k is None and single_v is None:
            continue
        if isinstance(single_k, str) or isinstance(single_v, str):
            editor.refused(node, next(s for s in (single_k, single_v) if isinstance(s, str)))
            continue
        if single_k is None or single_v is None or (shape(single_k) or ())[1] != (shape(single_v) or ())[1]:
            editor.refused(node, "keys and values are not repeated alike")
            continue
        heads, groups = (
            (shape(n) or ())[1] if (n := argument(node, "query")) else None,
            (shape(single_k) or ())[1],
        )
        scale = argument(node, "scale")
        rest = operands(node)[3:]
        new = editor.call(
            SDPA, argument(node, "query"), single_k, single_v, *rest, scale=scale, enable_gqa=True, like=node
        )
        editor.applied(node, "grouped queries", heads=str(heads), key_value_heads=str(groups))
        editor.replace(node, new)


def _single(editor: Editor, node: fx.Node) -> fx.Node | str | None:
    """`repeated`, also where heads were repeated behind the sequence: a transpose moves in front."""
    if not is_call(node, aten.transpose.int, aten.permute.default) or permutation(node) != [0, 2, 1, 3]:
        return repeated(node)
    found = repeated(operands(node)[0], heads=2)
    if not isinstance(found, fx.Node):
        return found
    return editor.call(aten.transpose.int, found, 1, 2, like=node)


def repeated(node: fx.Node, heads: int = 1) -> fx.Node | str | None:
    """The value `[B, G, T, D]` that `node` `[B, G r, T, D]` repeats; a reason where it repeats in another order.

    heads: the dimension that is repeated.
    """
    if len(shape(node) or ()) != 4:
        return None
    if is_call(node, aten.repeat_interleave.self_int):
        x, count, dim = operands(node)[0], operands(node)[1], argument(node, "dim")
        return x if isinstance(count, int) and dim in (heads, heads - 4) and isinstance(x, fx.Node) else None
    if is_call(node, aten.repeat.default):
        return "whole blocks of heads are repeated, so query head h reads key head h % groups"
    if is_call(node, aten.expand.default):
        x = operands(node)[0]
        one = isinstance(x, fx.Node) and len(shape(x) or ()) == 4 and (shape(x) or ())[heads] == 1
        return x if one and isinstance(x, fx.Node) and _same_but(x, node, heads) else None
    if not is_call(node, *RESHAPES) or not is_call(operands(node)[0], aten.expand.default):
        return None
    expanded = operands(node)[0]
    inserted = operands(expanded)[0]
    five = shape(expanded) or ()
    if not is_call(inserted, aten.unsqueeze.default) or len(five) != 5:
        return None
    x = operands(inserted)[0]
    position = int(operands(inserted)[1]) % 5
    if not isinstance(x, fx.Node) or not _same_but(x, node, heads):
        return None
    if position == heads:
        return "whole blocks of heads are repeated, so query head h reads key head h % groups"
    groups, repeats, total = five[heads], five[heads + 1], (shape(node) or ())[heads]
    fits = isinstance(groups, int) and isinstance(repeats, int) and groups * repeats == total
    return x if position == heads + 1 and fits else None


def _same_but(a: fx.Node, b: fx.Node, but: int) -> bool:
    first, second = shape(a) or (), shape(b) or ()
    return all(equal_sizes(x, y) for i, (x, y) in enumerate(zip(first, second, strict=True)) if i != but)
