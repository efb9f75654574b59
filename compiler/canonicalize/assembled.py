"""A tensor that is filled part by part is a concatenation.

    slice_scatter(slice_scatter(z, a, d, 0, n), b, d, n, N)   →   cat([a, b], d)

What is written in place (`k = x.new_empty(...); k[..., :n] = a; k[..., n:] = b`, keys of latent attention) is captured
like this, each part copied into a slice of what was there. z does not matter where all of it is written.

Side conditions: the parts do not overlap and fill one dimension, which has a static size, and are of one type. A part
that was broadcast stays a copy. Exactness: bitwise.
"""

from __future__ import annotations

from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape
from ..passes import Guarantee, define_pass
from .match import aten, equal_shapes, is_call, operands


@define_pass(Guarantee.BITWISE)
def canonicalize_assembled(editor: Editor) -> None:
    """See the module."""
    for node in reversed(list(editor.calls(aten.slice_scatter.default))):
        if node._erased:
            continue
        parts = _parts(node)
        if parts is None:
            continue
        pieces = [_piece(source) for _, _, source in parts]
        dim = int(argument(node, "dim")) % len(shape(node) or (0,))
        editor.applied(node, f"{len(parts)} parts that fill a tensor are a concatenation")
        editor.replace(node, editor.call(aten.cat.default, pieces, dim, like=node))


def _parts(node: fx.Node) -> list[tuple[int, int, fx.Node]] | None:
    """(start, end, source) in order, of what fills a tensor along one dimension; None where it is not filled."""
    rank = len(shape(node) or ())
    dim = int(argument(node, "dim")) % max(rank, 1)
    size = (shape(node) or (None,))[dim]
    found: list[tuple[int, int, fx.Node]] = []
    current: object = node
    while is_call(current, aten.slice_scatter.default) and isinstance(size, int):
        start, end = argument(current, "start"), argument(current, "end")
        plain = all(isinstance(v, (int, type(None))) for v in (start, end)) and argument(current, "step") == 1
        if not plain or int(argument(current, "dim")) % rank != dim:
            return None
        first, last, _ = slice(start, end).indices(size)
        if any(first < b and a < last for a, b, _ in found):
            return None
        source = argument(current, "src")
        if dtype(source) != dtype(node):
            return None
        found.append((first, last, source))
        if sum(b - a for a, b, _ in found) == size:
            return sorted(found, key=lambda part: part[0])
        current = operands(current)[0]
    return None


def _piece(source: fx.Node) -> fx.Node:
    """What a source holds: what was copied into a slice has that slice's shape."""
    if not is_call(source, aten.copy.default):
        return source
    held: fx.Node = operands(source)[1]
    return held if dtype(held) == dtype(source) and equal_shapes(held, source) else source
