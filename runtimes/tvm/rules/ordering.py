"""Topk and sort: every element's rank, by comparing it with all others of its row.

n comparisons an element, in vectors: meant for rows of experts or classes, not for long ones. Of equal elements the
first comes first. (NaN has no rank of its own: the places of its row are valid, and not more.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import te, tirx

from ....compiler.graph import value
from ..builder import Builder, Kernel, fake
from .registry import aten, rule

Expr = Any


@rule(aten.topk.default)
def _topk(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _ordered(b, node, a["self"], a["dim"], a["largest"])


@rule(aten.sort.default, aten.sort.stable)
def _sort(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _ordered(b, node, a["self"], a["dim"], a["descending"])


def _ordered(b: Builder, node: fx.Node, source: fx.Node, dim: int, descending: bool) -> Any:
    """The values and places of the first elements, as many as the node's results have."""
    d = dim % max(1, fake(source).dim())
    results = list(value(node))

    def describe(k: Kernel) -> Sequence[te.Tensor]:
        x = k.tensor(source)
        other = te.reduce_axis((0, x.shape[d]), "r")
        whole = te.reduce_axis((0, x.shape[d]), "j")
        zero, one = (tirx.IntImm("int64", v) for v in (0, 1))

        def along(i: Sequence[Expr], at: Expr) -> Expr:
            return x(*i[:d], at, *i[d + 1 :])

        def in_front(*i: Expr) -> Expr:
            this, that = along(i, i[d]), along(i, other)
            before = that > this if descending else that < this
            tied = tirx.And(tirx.EQ(that, this), other.var < i[d])
            return te.sum(tirx.Select(tirx.Or(before, tied), one, zero), axis=other)

        rank = te.compute(x.shape, in_front, name="rank")

        def place_of(*i: Expr) -> Expr:
            here = tirx.EQ(rank(*i[:d], whole, *i[d + 1 :]), i[d].astype("int64"))
            return te.max(tirx.Select(here, whole.var.astype("int64"), zero), axis=whole)

        shape = [k.size(s) for s in results[0].shape]
        place = te.compute(shape, place_of, name="place")
        return [te.compute(shape, lambda *i: along(i, place(*i)), name="value"), place]

    pair = b.kernel(node, describe, results=results)
    return tuple(b.emit(pair[i], node) for i in range(2))
