"""Reductions into places that indices name all count what was there before, and means are sums.

    scatter_reduce(x, i, v, "sum")                        →  scatter_add(x, i, v)
    scatter_reduce(x, i, v, "mean")                       →  scatter_add(x, i, v) / (1 + how many)
    scatter_reduce(x, i, v, "amax", include_self=False)   →  scatter_reduce(where(any, -inf, x), i, v, "amax")

Runtimes differ in the other spellings: torch.onnx writes means as sums, and keeps what was there.

Side conditions: floating point for what needs an infinity or a division. Exactness: real.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..editor import Editor
from ..graph import argument
from ..passes import Guarantee, define_pass
from .match import aten, is_float

_NEUTRAL = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}


@define_pass(Guarantee.REAL)
def canonicalize_scatter(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.scatter_reduce.two):
        how, kept = argument(node, "reduce"), argument(node, "include_self")
        if kept and how in ("amax", "amin", "prod"):
            continue
        if not is_float(node) and (how == "mean" or not kept):
            editor.refused(node, f"a {how} of integers, without what was there")
            continue
        editor.replace(node, _spelled(editor, node, how, kept))


def _spelled(editor: Editor, node: fx.Node, how: str, kept: bool) -> fx.Node:
    x, dim, index, values = (argument(node, name) for name in ("self", "dim", "index", "src"))

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return editor.call(target, *args, like=node, **kwargs)

    editor.applied(node, f"scatter of {how}{'' if kept else ' without what was there'}")
    count = written = None
    if how == "mean" or not kept:
        one = call(aten.ones_like.default, values)
        count = call(aten.scatter_add.default, call(aten.zeros_like.default, x), dim, index, one)
        written = call(aten.gt.Scalar, count, 0)
    start = x
    if not kept:
        start = call(aten.where.self, written, call(aten.full_like.default, x, _NEUTRAL[how]), x)
    if how not in ("sum", "mean"):
        return call(aten.scatter_reduce.two, start, dim, index, values, how, include_self=True)
    total = call(aten.scatter_add.default, start, dim, index, values)
    if how == "sum":
        return total
    assert count is not None
    return call(
        aten.div.Tensor,
        total,
        call(aten.add.Tensor, count, 1) if kept else call(aten.clamp.default, count, 1),
    )
