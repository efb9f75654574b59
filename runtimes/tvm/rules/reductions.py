"""Sums, means, extremes and what is made of them: variance, norms, softmax, running sums and products."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from tvm import relax, te, tirx
from tvm.script import tirx as T

from ....compiler.errors import UnsupportedError
from ....compiler.graph import value
from ..builder import Builder, Kernel, dtype_name, fake
from .pointwise import cast, constant
from .registry import aten, rule

Expr = Any


def dims_of(node: fx.Node, dim: Any) -> list[int]:
    """Dimensions that are reduced, sorted; None or [] means all."""
    rank = fake(node).dim()
    if dim is None or dim == []:
        return list(range(rank))
    return sorted({d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])})


def reduced(
    k: Kernel,
    shape: Sequence[Expr],
    dims: Sequence[int],
    keep: bool,
    element: Callable[..., Expr],
    out: Sequence[Expr],
    combine: Callable[..., Any],
    name: str,
) -> te.Tensor:
    """Reduce `element(*indices)` over `dims` of `shape`; `out` is the result's shape."""
    axes = {d: te.reduce_axis((0, shape[d]), f"r{d}") for d in dims}

    def at(*i: Expr) -> Expr:
        own = list(i)
        indices = []
        for d in range(len(shape)):
            if d in axes:
                if keep:
                    own.pop(0)
                indices.append(axes[d])
            else:
                indices.append(own.pop(0))
        return combine(element(*indices), axis=list(axes.values()))

    return te.compute(list(out), at, name=name)


def count(shape: Sequence[Expr], dims: Sequence[int], dtype: str) -> Expr:
    """How many elements one reduction has."""
    total: Expr = tirx.IntImm("int64", 1)
    for d in dims:
        total = total * shape[d]
    return total.astype(dtype)


def _reduction(
    b: Builder, node: fx.Node, source: fx.Node, dim: Any, keep: bool, combine: Callable[..., Any],
    before: Callable[[Expr], Expr] | None = None, after: Callable[[Expr, Expr], Expr] | None = None,
    dtype: str | None = None,
) -> Any:  # fmt: skip
    """after(total, number of elements)."""
    result = dtype_name(fake(node).dtype)
    wide = dtype or result

    def describe(k: Kernel) -> te.Tensor:
        x = k.tensor(source)
        shape, dims = k.shape(source), dims_of(source, dim)
        if not shape:
            dims = []

        def element(*i: Expr) -> Expr:
            v = cast(x(*i), wide)
            return before(v) if before is not None else v

        out = k.shape(node)
        total = reduced(k, shape, dims, keep, element, out, combine, "total") if dims else te.compute(
            out, lambda *i: element(*i), name="total")  # fmt: skip
        if after is None and wide == result:
            return total
        number = count(shape, dims, wide)
        return te.compute(
            out,
            lambda *i: cast(after(total(*i), number) if after is not None else total(*i), result),
            name="y",
        )

    return b.kernel(node, describe)


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(b, node, a["self"], a.get("dim"), a.get("keepdim", False), te.sum)


@rule(aten.mean.dim, aten.mean.default)
def _mean(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(
        b, node, a["self"], a.get("dim"), a.get("keepdim", False), te.sum, after=lambda t, n: t / n
    )


@rule(aten.amax.default)
def _amax(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(b, node, a["self"], a["dim"], a["keepdim"], te.max)


@rule(aten.amin.default)
def _amin(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(b, node, a["self"], a["dim"], a["keepdim"], te.min)


@rule(aten.max.default, aten.min.default)
def _extreme(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    combine = te.max if node.target is aten.max.default else te.min
    return _reduction(b, node, a["self"], None, False, combine)


@rule(aten.any.dim, aten.any.dims, aten.any.default)
def _any(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _truth(b, node, a, te.max)


@rule(aten.all.dim, aten.all.dims, aten.all.default)
def _all(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _truth(b, node, a, te.min)


def _truth(b: Builder, node: fx.Node, a: dict[str, Any], combine: Callable[..., Any]) -> Any:
    own = dtype_name(fake(a["self"]).dtype)
    return _reduction(
        b, node, a["self"], a.get("dim"), a.get("keepdim", False), combine, dtype=own if own == "int8" else "int8",
        before=None if own == "bool" else lambda v: tirx.Select(tirx.NE(v, constant(0, "int8")), constant(1, "int8"),
                                                                 constant(0, "int8")),
    ) if own in ("bool", "int8") else _reduction(
        b, node, a["self"], a.get("dim"), a.get("keepdim", False), combine, dtype=own,
        before=lambda v: tirx.Select(tirx.NE(v, constant(0, own)), constant(1, own), constant(0, own)),
    )  # fmt: skip


@rule(aten.argmax.default, aten.argmin.default)
def _arg(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    if a["dim"] is None and fake(a["self"]).dim() != 1:
        raise UnsupportedError("argmax and argmin are lowered along a dimension", got="dim=None")
    values = fake(node).new_empty(fake(node).shape, dtype=fake(a["self"]).dtype)
    largest = node.target is aten.argmax.default
    return _with_index(b, node, a["self"], a["dim"] or 0, a["keepdim"], largest, [values, fake(node)], 1)


@rule(aten.max.dim, aten.min.dim)
def _max_dim(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    largest = node.target is aten.max.dim
    return _with_index(b, node, a["self"], a["dim"], a["keepdim"], largest, list(value(node)), None)


def _with_index(
    b: Builder, node: fx.Node, source: fx.Node, dim: int, keep: bool, largest: bool, fakes: list[Any], only: int | None
) -> Any:  # fmt: skip
    """The extreme along a dimension, then the first place that holds it: two reductions that run in vectors, where one
    of pairs does not."""

    def describe(k: Kernel) -> Sequence[te.Tensor]:
        x = k.tensor(source)
        d = dim % fake(source).dim()
        size = k.shape(source)[d]
        one, two = te.reduce_axis((0, size), "r"), te.reduce_axis((0, size), "p")
        shape = [k.size(s) for s in fakes[0].shape]

        def element(i: Sequence[Expr], axis: Any) -> Expr:
            own = list(i)
            if keep:
                own.pop(d)
            own.insert(d, axis)
            return x(*own)

        extreme = te.max if largest else te.min
        found = te.compute(shape, lambda *i: extreme(element(i, one), axis=one), name="extreme")

        def first(*i: Expr) -> Expr:
            # Where nothing is equal (NaN), the last place, so that it is one.
            here = tirx.EQ(element(i, two), found(*i))
            last = tirx.IntImm("int64", size - 1) if isinstance(size, int) else size - 1
            return te.min(tirx.Select(here, two.var.astype("int64"), last), axis=two)

        return [found, te.compute(shape, first, name="place")]

    pair = b.kernel(node, describe, results=fakes)
    parts = tuple(b.emit(pair[i], node) for i in range(2))
    return parts[only] if only is not None else parts


@rule(
    aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim, aten.var.default, aten.std.default
)
def _var(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, correction = a["self"], a.get("correction", int(a.get("unbiased", True)))
    correction = 1 if correction is None else correction
    dtype = dtype_name(fake(node).dtype)
    root = str(node.target).startswith("aten.std")

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        dims = dims_of(source, a.get("dim"))
        kept = [tirx.IntImm("int64", 1) if d in dims else s for d, s in enumerate(shape)]
        number = count(shape, dims, dtype)
        total = reduced(k, shape, dims, True, lambda *i: x(*i), kept, te.sum, "total")

        def square(*i: Expr) -> Expr:
            mean = total(*(0 if d in dims else at for d, at in enumerate(i))) / number
            return (x(*i) - mean) * (x(*i) - mean)

        squares = reduced(k, shape, dims, a.get("keepdim", False), square, k.shape(node), te.sum, "squares")

        def last(*i: Expr) -> Expr:
            v = squares(*i) / (number - constant(correction, dtype))
            return tirx.sqrt(v) if root else v

        return te.compute(k.shape(node), last, name="y")

    return b.kernel(node, describe)


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def _norm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    order = a.get("ord", a.get("p"))
    if order not in (1, 2, 2.0, 1.0, float("inf")):
        raise UnsupportedError("This norm is not lowered", expected="ord 1 | 2 | inf", got=str(order))
    if order == 2:
        return _reduction(
            b, node, a["self"], a["dim"], a["keepdim"], te.sum, lambda v: v * v, lambda t, n: tirx.sqrt(t)
        )
    return _reduction(b, node, a["self"], a["dim"], a["keepdim"], te.sum if order == 1 else te.max, tirx.abs)


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.logsumexp.default,
)
def _softmax(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source = a["self"]
    rank = fake(source).dim()
    dims = dims_of(source, a["dim"])
    dtype = dtype_name(fake(node).dtype)
    logarithm = "log" in str(node.target)
    only_sum = node.target is aten.logsumexp.default

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        kept = [tirx.IntImm("int64", 1) if d in dims else s for d, s in enumerate(shape)]

        def own(i: Sequence[Expr]) -> list[Expr]:
            return [0 if d in dims else at for d, at in enumerate(i)]

        largest = reduced(k, shape, dims, True, lambda *i: cast(x(*i), dtype), kept, te.max, "largest")
        weights = te.compute(
            shape, lambda *i: tirx.exp(cast(x(*i), dtype) - largest(*own(i))), name="weights"
        )
        total = reduced(k, shape, dims, True, lambda *i: weights(*i), kept, te.sum, "total")
        if only_sum:
            expand = lambda i: i if a["keepdim"] else _insert(i, dims, rank)  # noqa: E731
            return te.compute(
                k.shape(node),
                lambda *i: tirx.log(total(*own(expand(i)))) + largest(*own(expand(i))),
                name="y",
            )
        if logarithm:
            return te.compute(
                shape, lambda *i: cast(x(*i), dtype) - largest(*own(i)) - tirx.log(total(*own(i))), name="y"
            )
        return te.compute(shape, lambda *i: weights(*i) / total(*own(i)), name="y")

    return b.kernel(node, describe)


def _insert(i: Sequence[Expr], dims: Sequence[int], rank: int) -> list[Expr]:
    rest = list(i)
    return [0 if d in dims else rest.pop(0) for d in range(rank)]


@rule(aten.cumsum.default, aten.cumprod.default)
def _cumulative(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    """Rows in parallel, each in order. The three sizes are those in front of, along and behind the dimension."""
    source, dim = a["self"], a["dim"] % max(1, fake(node).dim())
    own, result = dtype_name(fake(source).dtype), dtype_name(fake(node).dtype)
    shape = b.shape(source)
    one: Expr = tirx.IntImm("int64", 1)
    outer, inner = one, one
    for size in shape[:dim]:
        outer = outer * size
    for size in shape[dim + 1 :]:
        inner = inner * size
    length = shape[dim] if shape else one
    is_product = node.target == aten.cumprod.default
    place = b.bb.add_func(running(own, result, is_product), "cumprod" if is_product else "cumsum")
    flat = b.bb.emit(relax.op.reshape(b[source], relax.ShapeExpr([outer, length, inner])))
    made = b.bb.emit(relax.call_tir(place, [flat], relax.TensorType([outer, length, inner], result)))
    return b.emit(relax.op.reshape(made, relax.ShapeExpr(shape)), node)


def running(own: str, result: str, is_product: bool) -> tirx.PrimFunc:
    """`y[i, t, j] = x[i, 0, j] + ... + x[i, t, j]` (or their product), its loops in their final form."""
    both, neutral = (operator.mul, 1) if is_product else (operator.add, 0)

    @T.prim_func(private=True, s_tir=True)
    def cumsum(x: T.handle, y: T.handle):  # type: ignore[no-untyped-def] # TVM's script
        T.func_attr(
            {
                "tirx.is_scheduled": True,
                "tirx.noalias": True,
                "isofold.schedule": "running sum: rows in parallel",
            }
        )
        outer, length, inner = T.int64(), T.int64(), T.int64()
        x_at = T.match_buffer(x, (outer, length, inner), own)
        y_at = T.match_buffer(y, (outer, length, inner), result)
        for i in T.parallel(outer):
            for t in range(length):
                for j in range(inner):
                    with T.sblock("sum"):
                        T.reads(x_at[i, t, j], y_at[i, 0:length, j])
                        T.writes(y_at[i, t, j])
                        y_at[i, t, j] = both(
                            T.cast(x_at[i, t, j], result),
                            T.if_then_else(
                                t > T.int64(0), y_at[i, t - T.int64(1), j], T.cast(neutral, result)
                            ),
                        )

    return cumsum


@rule(aten.isfinite.default)
def _isfinite(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    if not fake(a["self"]).dtype.is_floating_point:
        return b.elements(node, [], lambda k: lambda *i: constant(1, "bool"))
    return b.elements(node, [a["self"]], lambda k, x: lambda *i: tirx.isfinite(x(*i)))
