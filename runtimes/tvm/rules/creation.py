"""Operators that make values from numbers and sizes: ranges, constants, identity matrices."""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import te, tirx

from ..builder import Builder, Kernel, dtype_name, fake
from .pointwise import cast, constant, read
from .registry import aten, rule

Expr = Any


def _filled(b: Builder, node: fx.Node, fill: Any) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        return te.compute(k.shape(node), lambda *i: read(k, fill, (), dtype), name="y")

    return b.kernel(node, describe, "full")


@rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _filled(b, node, a["fill_value"])


@rule(aten.fill.Scalar)
def _fill(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _filled(b, node, a["value"])


@rule(aten.scalar_tensor.default)
def _scalar_tensor(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _filled(b, node, a["s"])


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _filled(b, node, 1)


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.empty.memory_format,
      aten.empty_like.default, aten.new_empty.default)  # fmt: skip
def _zeros(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _filled(b, node, 0)


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    start, step = a.get("start", 0), a.get("step", 1)
    wide = dtype if "float" in dtype else "int64"

    def describe(k: Kernel) -> te.Tensor:
        first, stride = read(k, start, (), wide), read(k, step, (), wide)
        return te.compute(k.shape(node), lambda i: cast(first + i.astype(wide) * stride, dtype), name="y")

    return b.kernel(node, describe, "arange")


@rule(aten.linspace.default)
def _linspace(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    steps = int(a["steps"])
    start, end = float(a["start"]), float(a["end"])
    stride = (end - start) / max(steps - 1, 1)

    def describe(k: Kernel) -> te.Tensor:
        def element(i: Expr) -> Expr:
            up = constant(start, dtype) + i.astype(dtype) * constant(stride, dtype)
            down = constant(end, dtype) - (steps - 1 - i).astype(dtype) * constant(stride, dtype)
            return tirx.Select(i < steps // 2, up, down)  # from both ends, as torch does

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(aten.eye.default, aten.eye.m)
def _eye(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        return te.compute(
            k.shape(node),
            lambda i, j: tirx.Select(tirx.EQ(i, j), constant(1, dtype), constant(0, dtype)),
            name="y",
        )

    return b.kernel(node, describe)
