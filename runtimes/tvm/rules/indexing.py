"""Operators that read or write where indices say: embedding, gather, index, scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import te, tirx

from ....compiler.errors import UnsupportedError
from ..builder import Builder, Kernel, dtype_name, fake, sizes
from .pointwise import cast, constant, equal
from .registry import aten, rule

Expr = Any


def wrapped(index: Expr, size: Expr) -> Expr:
    """An index as torch reads it: negative ones count from the end."""
    index = index.astype("int64")
    return tirx.Select(index < 0, index + size, index)


@rule(aten.embedding.default)
def _embedding(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    def body(k: Kernel, table: te.Tensor, ids: te.Tensor) -> Callable[..., Expr]:
        return lambda *i: table(ids(*i[:-1]).astype("int64"), i[-1])

    return b.elements(node, [a["weight"], a["indices"]], body)


@rule(aten.gather.default)
def _gather(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dim = a["dim"] % max(1, fake(node).dim())

    def body(k: Kernel, x: te.Tensor, ids: te.Tensor) -> Callable[..., Expr]:
        return lambda *i: x(*(ids(*i).astype("int64") if d == dim else at for d, at in enumerate(i)))

    return b.elements(node, [a["self"], a["index"]], body)


@rule(aten.index_select.default)
def _index_select(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dim = a["dim"] % max(1, fake(node).dim())

    def body(k: Kernel, x: te.Tensor, ids: te.Tensor) -> Callable[..., Expr]:
        return lambda *i: x(*(ids(at).astype("int64") if d == dim else at for d, at in enumerate(i)))

    return b.elements(node, [a["self"], a["index"]], body)


def _layout(indices: list[Any], rank: int) -> tuple[list[int], int, int]:
    """Of advanced indexing: indexed dimensions, rank of the broadcast index, its place in the result."""
    own = [d for d, index in enumerate(indices) if index is not None]
    broadcast = max(fake(indices[d]).dim() for d in own)
    together = own == list(range(own[0], own[-1] + 1))
    return own, broadcast, own[0] if together else 0


def _boolean(indices: list[Any]) -> bool:
    return any(index is not None and str(fake(index).dtype) == "torch.bool" for index in indices)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, indices = a["self"], list(a["indices"])
    if _boolean(indices):
        raise UnsupportedError(
            "Indexing with a mask has a size that depends on values", hint="use where, or multiply"
        )
    rank = fake(source).dim()
    own, broadcast, place = _layout(indices, rank)

    def describe(k: Kernel) -> te.Tensor:
        x = k.tensor(source)
        ids = {d: k.tensor(indices[d]) for d in own}

        def element(*i: Expr) -> Expr:
            shared = i[place : place + broadcast]
            rest = [*i[:place], *i[place + broadcast :]]
            return x(
                *(wrapped(k.at(ids[d], shared), x.shape[d]) if d in ids else rest.pop(0) for d in range(rank))
            )

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    """Every element looks for the last index that names it: right for any indices, meant for few of them."""
    source, indices, values = a["self"], list(a["indices"]), a["values"]
    dtype, rank = dtype_name(fake(node).dtype), fake(source).dim()
    if _boolean(indices):
        own = [d for d, index in enumerate(indices) if index is not None]
        if len(own) == 1 and own[0] == 0 and fake(values).dim() == 0 and not a["accumulate"]:
            return _masked_put(b, node, source, indices[0], values)
        raise UnsupportedError(
            "Writing through a mask is lowered for one mask over the first dimensions and one value"
        )
    own, broadcast, place = _layout(indices, rank)
    if broadcast > 1:
        raise UnsupportedError(
            "index_put is lowered for indices of one dimension", got=f"{broadcast} dimensions"
        )

    def describe(k: Kernel) -> te.Tensor:
        x, v = k.tensor(source), k.tensor(values)
        ids = {d: k.tensor(indices[d]) for d in own}
        many = max((sizes(indices[d])[0] for d in own if fake(indices[d]).dim()), key=str, default=1)
        axis = te.reduce_axis((0, k.size(many)), "r")

        def hit(i: tuple[Expr, ...]) -> Expr:
            found: Expr = None
            for d in own:
                same = equal(wrapped(k.at(ids[d], (axis.var,)), x.shape[d]), i[d])
                found = same if found is None else tirx.And(found, same)
            return found

        def value_at(i: tuple[Expr, ...], at: Expr) -> Expr:
            rest = [index for d, index in enumerate(i) if d not in own]
            return cast(k.at(v, [*rest[:place], at, *rest[place:]]), dtype)

        if a["accumulate"]:
            zero = constant(0, dtype)
            added = te.compute(
                x.shape,
                lambda *i: te.sum(tirx.Select(hit(i), value_at(i, axis.var), zero), axis=axis),
                name="added",
            )
            return te.compute(x.shape, lambda *i: x(*i) + added(*i), name="y")
        nowhere = tirx.IntImm("int64", -1)
        last = te.compute(
            x.shape,
            lambda *i: te.max(tirx.Select(hit(i), axis.var.astype("int64"), nowhere), axis=axis),
            name="last",
        )
        return te.compute(
            x.shape,
            lambda *i: tirx.if_then_else(last(*i) < 0, x(*i), value_at(i, tirx.max(last(*i), 0))),
            name="y",
        )

    b.fallbacks.setdefault("index_put searches its indices for every element", []).append(node.name)
    return b.kernel(node, describe)


def _masked_put(b: Builder, node: fx.Node, source: fx.Node, mask: fx.Node, value: fx.Node) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def body(k: Kernel, x: te.Tensor, m: te.Tensor, v: te.Tensor) -> Callable[..., Expr]:
        return lambda *i: tirx.Select(m(*i[: len(m.shape)]), cast(v(), dtype), x(*i))

    return b.elements(node, [source, mask, value], body)


@rule(aten.scatter.value, aten.scatter.src)
def _scatter(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    """Every element looks for the last index that names it, as for index_put: meant for few of them."""
    source, ids, dim = a["self"], a["index"], a["dim"] % max(1, fake(node).dim())
    dtype, rest = dtype_name(fake(node).dtype), [d for d in range(fake(node).dim()) if d != dim]

    def describe(k: Kernel) -> te.Tensor:
        x, index = k.tensor(source), k.tensor(ids)
        values = k.tensor(a["src"]) if "src" in a else None
        axis = te.reduce_axis((0, index.shape[dim]), "r")
        nowhere = tirx.IntImm("int64", -1)
        length = [s.astype("int64") for s in index.shape]

        def inside(i: tuple[Expr, ...], at: Expr) -> list[Expr]:
            # The index may be smaller than what it writes to.
            own = [tirx.min(v.astype("int64"), length[d] - 1) for d, v in enumerate(i)]
            own[dim] = at
            return own

        def place(*i: Expr) -> Expr:
            hit = tirx.EQ(index(*inside(i, axis.var)).astype("int64"), i[dim].astype("int64"))
            for d in rest:
                hit = tirx.And(hit, i[d].astype("int64") < length[d])
            return te.max(tirx.Select(hit, axis.var.astype("int64"), nowhere), axis=axis)

        last = te.compute(x.shape, place, name="last")

        def element(*i: Expr) -> Expr:
            own = None if values is None else values(*inside(i, tirx.max(last(*i), 0)))
            written = constant(a["value"], dtype) if own is None else own
            return tirx.if_then_else(last(*i) < 0, x(*i), written)

        return te.compute(x.shape, element, name="y")

    b.fallbacks.setdefault("scatter searches its indices for every element", []).append(node.name)
    return b.kernel(node, describe)


@rule(aten.scatter_add.default, aten.scatter_reduce.two)
def _scatter_reduce(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    """Every element looks for all indices that name it."""
    source, ids, dim = a["self"], a["index"], a["dim"] % max(1, fake(node).dim())
    dtype, how = dtype_name(fake(node).dtype), a.get("reduce", "sum")
    if how not in _REDUCTIONS or not a.get("include_self", True):
        raise UnsupportedError(
            "This scatter is not lowered", expected=f"{', '.join(_REDUCTIONS)} with what was there", got=how
        )
    reduction, neutral, both = _REDUCTIONS[how]

    def describe(k: Kernel) -> te.Tensor:
        x, index, values = k.tensor(source), k.tensor(ids), k.tensor(a["src"])
        axis = te.reduce_axis((0, index.shape[dim]), "r")
        length = [s.astype("int64") for s in index.shape]

        def found(*i: Expr) -> Expr:
            # The index may be smaller than what it writes to.
            at = [tirx.min(v.astype("int64"), length[d] - 1) for d, v in enumerate(i)]
            at[dim] = axis.var
            hit = tirx.EQ(wrapped(index(*at), x.shape[dim]), i[dim].astype("int64"))
            for d in range(len(i)):
                if d != dim:
                    hit = tirx.And(hit, i[d].astype("int64") < length[d])
            return reduction(tirx.Select(hit, values(*at), neutral(dtype)), axis=axis)

        reduced = te.compute(x.shape, found, name="reduced")
        return te.compute(x.shape, lambda *i: both(x(*i), reduced(*i)), name="y")

    b.fallbacks.setdefault("scatter searches its indices for every element", []).append(node.name)
    return b.kernel(node, describe)


_REDUCTIONS: dict[str, tuple[Callable[..., Expr], Callable[[str], Expr], Callable[[Expr, Expr], Expr]]] = {
    "sum": (te.sum, lambda dtype: constant(0, dtype), lambda x, y: x + y),
    "amax": (te.max, tirx.min_value, tirx.max),
    "amin": (te.min, tirx.max_value, tirx.min),
}


@rule(aten.slice_scatter.default)
def _slice_scatter(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    from .views import clamped_start

    source, part, dim, step = a["self"], a["src"], a["dim"] % fake(node).dim(), a["step"]

    def describe(k: Kernel) -> te.Tensor:
        x, p = k.tensor(source), k.tensor(part)
        first = clamped_start(k, a["start"] or 0, sizes(source)[dim])
        length = k.size(sizes(part)[dim])

        def element(*i: Expr) -> Expr:
            away = i[dim] - first
            inside = tirx.And(tirx.And(away >= 0, away < length * step), equal(tirx.floormod(away, step), 0))
            own = p(*(tirx.floordiv(away, step) if d == dim else at for d, at in enumerate(i)))
            return tirx.if_then_else(inside, own, x(*i))

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(aten.select_scatter.default)
def _select_scatter(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    from .views import clamped_start

    source, part, dim = a["self"], a["src"], a["dim"] % fake(node).dim()

    def describe(k: Kernel) -> te.Tensor:
        x, p = k.tensor(source), k.tensor(part)
        place = clamped_start(k, a["index"], sizes(source)[dim])

        def element(*i: Expr) -> Expr:
            return tirx.Select(equal(i[dim], place), p(*i[:dim], *i[dim + 1 :]), x(*i))

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)
