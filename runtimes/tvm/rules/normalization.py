"""Normalizations that the canonical form leaves alone: over groups of channels, and batch norm with fixed statistics.

LayerNorm and RMSNorm are `isofold.norm`, an operator of the op library.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import te, tirx

from ..builder import Builder, Kernel, dtype_name, fake
from .pointwise import constant
from .reductions import count, reduced
from .registry import aten, rule

Expr = Any


def _moments(
    k: Kernel, x: te.Tensor, shape: list[Expr], dims: list[int], dtype: str
) -> tuple[Any, Any, list[Expr]]:
    kept = [tirx.IntImm("int64", 1) if d in dims else s for d, s in enumerate(shape)]
    number = count(shape, dims, dtype)
    total = reduced(k, shape, dims, True, lambda *i: x(*i), kept, te.sum, "total")
    mean = te.compute(kept, lambda *i: total(*i) / number, name="mean")

    def square(*i: Expr) -> Expr:
        own = mean(*(0 if d in dims else at for d, at in enumerate(i)))
        return (x(*i) - own) * (x(*i) - own)

    squares = reduced(k, shape, dims, True, square, kept, te.sum, "squares")
    return mean, te.compute(kept, lambda *i: squares(*i) / number, name="variance"), kept


@rule(aten.group_norm.default, aten.instance_norm.default)
def _group_norm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source: fx.Node = a["input"]
    weight, bias = a["weight"], a["bias"]
    dtype = dtype_name(fake(node).dtype)
    eps = constant(a["eps"], dtype)

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        w = k.tensor(weight) if weight is not None else None
        v = k.tensor(bias) if bias is not None else None
        groups = a["num_groups"] if "num_groups" in a else shape[1]
        inner = tirx.floordiv(shape[1], groups) if "num_groups" in a else tirx.IntImm("int64", 1)
        split = [
            shape[0],
            tirx.IntImm("int64", groups) if isinstance(groups, int) else groups,
            inner,
            *shape[2:],
        ]
        dims = list(range(2, len(split)))
        grouped = te.compute(split, lambda n, g, c, *i: x(n, g * inner + c, *i), name="grouped")
        mean, variance, _ = _moments(k, grouped, split, dims, dtype)

        def element(n: Expr, c: Expr, *i: Expr) -> Expr:
            own = (n, tirx.floordiv(c, inner), *[0] * len(dims))
            y = (x(n, c, *i) - mean(*own)) / tirx.sqrt(variance(*own) + eps)
            y = y * w(c) if w is not None else y
            return y + v(c) if v is not None else y

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(aten.layer_norm.default)
def _layer_norm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, weight, bias = a["input"], a["weight"], a["bias"]
    dtype, width = dtype_name(fake(node).dtype), len(a["normalized_shape"])
    eps = constant(a["eps"], dtype)

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        w = k.tensor(weight) if weight is not None else None
        v = k.tensor(bias) if bias is not None else None
        dims = list(range(len(shape) - width, len(shape)))
        mean, variance, _ = _moments(k, x, shape, dims, dtype)

        def element(*i: Expr) -> Expr:
            own = [0 if d in dims else at for d, at in enumerate(i)]
            y = (x(*i) - mean(*own)) / tirx.sqrt(variance(*own) + eps)
            y = y * w(*i[-width:]) if w is not None else y
            return y + v(*i[-width:]) if v is not None else y

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(aten.rms_norm.default)
def _rms_norm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, weight = a["input"], a["weight"]
    dtype, width = dtype_name(fake(node).dtype), len(a["normalized_shape"])
    eps = constant(1.1920928955078125e-07 if a["eps"] is None else a["eps"], dtype)

    def describe(k: Kernel) -> te.Tensor:
        x, shape = k.tensor(source), k.shape(source)
        w = k.tensor(weight) if weight is not None else None
        dims = list(range(len(shape) - width, len(shape)))
        kept = [tirx.IntImm("int64", 1) if d in dims else s for d, s in enumerate(shape)]
        squares = reduced(k, shape, dims, True, lambda *i: x(*i) * x(*i), kept, te.sum, "squares")

        def element(*i: Expr) -> Expr:
            own = [0 if d in dims else at for d, at in enumerate(i)]
            y = x(*i) / tirx.sqrt(squares(*own) / count(shape, dims, dtype) + eps)
            return y * w(*i[-width:]) if w is not None else y

        return te.compute(shape, element, name="y")

    return b.kernel(node, describe)


@rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def _batch_norm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source = a["input"]
    parts = {name: a[name] for name in ("weight", "bias", "running_mean", "running_var")}
    dtype = dtype_name(fake(source).dtype)

    def describe(k: Kernel) -> te.Tensor:
        x = k.tensor(source)
        of: dict[str, Any] = {name: k.tensor(n) if n is not None else None for name, n in parts.items()}
        w, v, mean, var = of["weight"], of["bias"], of["running_mean"], of["running_var"]

        def element(n: Expr, c: Expr, *i: Expr) -> Expr:
            y = (x(n, c, *i) - mean(c)) / tirx.sqrt(var(c) + constant(a["eps"], dtype))
            y = y * w(c) if w is not None else y
            return y + v(c) if v is not None else y

        return te.compute(k.shape(source), element, name="y")

    made = b.kernel(node, describe, results=[fake(source)])
    return (made, None, None) if "native" in str(node.target) else made
