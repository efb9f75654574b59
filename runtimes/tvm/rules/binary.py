"""Operators with several operands: arithmetic, comparison, logic, selection, and casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import te, tirx

from ..builder import Builder, Kernel, dtype_name, fake
from .pointwise import common_dtype, constant, pointwise, read
from .registry import aten, rule

Expr = Any
Unary = Callable[[Expr], Expr]
Binary = Callable[[Expr, Expr], Expr]


def _floor_div(x: Expr, y: Expr) -> Expr:
    return tirx.floor(x / y) if "float" in str(x.ty.dtype) else tirx.floordiv(x, y)


def _remainder(x: Expr, y: Expr) -> Expr:
    return x - tirx.floor(x / y) * y if "float" in str(x.ty.dtype) else tirx.floormod(x, y)


def _power(x: Expr, y: Expr) -> Expr:
    return tirx.pow(x, y)


def _bits(both: Binary, bitwise: Binary) -> Binary:
    return lambda x, y: both(x, y) if str(x.ty.dtype) == "bool" else bitwise(x, y)


_and = _bits(tirx.And, tirx.bitwise_and)
_or = _bits(tirx.Or, tirx.bitwise_or)
_xor = _bits(lambda x, y: tirx.NE(x.astype("int8"), y.astype("int8")), tirx.bitwise_xor)

_BINARY: dict[str, Binary] = {
    "mul": lambda x, y: tirx.And(x, y) if str(x.ty.dtype) == "bool" else x * y,
    "maximum": tirx.max,
    "minimum": tirx.min,
    "remainder": _remainder,
    "fmod": lambda x, y: x - tirx.trunc(x / y) * y if "float" in str(x.ty.dtype) else tirx.truncmod(x, y),
    "floor_divide": _floor_div,
    "atan2": lambda x, y: tirx.atan2(x, y),
    "eq": tirx.EQ,
    "ne": tirx.NE,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "bitwise_and": _and,
    "bitwise_or": _or,
    "bitwise_xor": _xor,
    "__and__": _and,
    "__or__": _or,
    "__xor__": _xor,
    "__lshift__": lambda x, y: x << y,
    "__rshift__": lambda x, y: x >> y,
    "bitwise_left_shift": lambda x, y: x << y,
    "bitwise_right_shift": lambda x, y: x >> y,
    "logical_and": tirx.And,
    "logical_or": tirx.Or,
    "logical_xor": _xor,
}


def _overloads(name: str) -> list[Any]:
    """The functional overloads of an operator that compute element by element."""
    packet = getattr(aten, name, None)
    names = packet.overloads() if packet is not None else []
    return [
        getattr(packet, o)
        for o in names
        if "out" not in o and ("Tensor" in o or "Scalar" in o or o == "default")
    ]


def _make_binary(name: str, function: Binary) -> None:
    @rule(*_overloads(name))
    def made(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
        x, y = list(a.values())[:2]
        dtype = "bool" if name.startswith("logical") else dtype_name(common_dtype(x, y))
        if name in ("eq", "ne") and dtype == "bool":
            return pointwise(
                b, node, [x, y], dtype, lambda p, q: function(p.astype("int8"), q.astype("int8"))
            )
        return pointwise(b, node, [x, y], dtype, function)


for _name, _combine in _BINARY.items():
    _make_binary(_name, _combine)


@rule(aten.min.other)
def _min_other(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(b, node, [a["self"], a["other"]], dtype_name(fake(node).dtype), tirx.min)


@rule(aten.max.other)
def _max_other(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(b, node, [a["self"], a["other"]], dtype_name(fake(node).dtype), tirx.max)


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _scaled_sum(b, node, a["self"], a["other"], a["alpha"], 1)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _scaled_sum(b, node, a["self"], a["other"], a["alpha"], -1)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _scaled_sum(b, node, a["other"], a["self"], a["alpha"], -1)


def _scaled_sum(b: Builder, node: fx.Node, x: Any, y: Any, alpha: Any, sign: int) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def body(x: Expr, y: Expr) -> Expr:
        if dtype == "bool":
            return tirx.Or(x, y)
        scaled = y if alpha == 1 else y * constant(alpha, dtype)
        return x + scaled if sign > 0 else x - scaled

    return pointwise(b, node, [x, y], dtype, body)


@rule(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def _div(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    if a["other"] == 0:  # TVM refuses to divide by a zero that it sees
        infinity = constant(math.inf, dtype_name(fake(node).dtype))
        return pointwise(b, node, [a["self"]], dtype_name(fake(node).dtype), lambda x: x * infinity)
    return pointwise(b, node, [a["self"], a["other"]], dtype_name(fake(node).dtype), lambda x, y: x / y)


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    mode = a["rounding_mode"]

    def body(x: Expr, y: Expr) -> Expr:
        if mode is None:
            return x / y
        if mode == "floor":
            return _floor_div(x, y)
        return tirx.trunc(x / y) if "float" in str(x.ty.dtype) else tirx.truncdiv(x, y)

    return pointwise(b, node, [a["self"], a["other"]], dtype_name(fake(node).dtype), body)


@rule(aten.pow.Tensor_Scalar)
def _pow_scalar(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, exponent = dtype_name(fake(node).dtype), a["exponent"]

    def body(x: Expr) -> Expr:
        if exponent == 0.5:
            return tirx.sqrt(x)
        if exponent == -0.5:
            return constant(1, dtype) / tirx.sqrt(x)
        if exponent == int(exponent) and 1 <= abs(exponent) <= 8:
            product = x
            for _ in range(int(abs(exponent)) - 1):
                product = product * x
            return product if exponent > 0 else constant(1, dtype) / product
        return _power(x, constant(exponent, dtype))

    return pointwise(b, node, [a["self"]], dtype, body)


@rule(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(b, node, [a["self"], a["exponent"]], dtype_name(fake(node).dtype), _power)


# ---- selection and casts


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    condition, x, y = list(a.values())[:3]
    return _selected(b, node, condition, x, y)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _selected(b, node, a["mask"], a["value"], a["self"])


def _selected(b: Builder, node: fx.Node, condition: fx.Node, x: Any, y: Any) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        for operand in (condition, x, y):
            if isinstance(operand, fx.Node):
                k.tensor(operand)

        def element(*i: Expr) -> Expr:
            return tirx.Select(read(k, condition, i, "bool"), read(k, x, i, dtype), read(k, y, i, dtype))

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(
    aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.dropout.default, aten.copy.default,
)  # fmt: skip
def _same(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    x = a["src"] if "src" in a else next(iter(a.values()))
    same_shape = [str(s) for s in fake(x).shape] == [str(s) for s in fake(node).shape]
    if fake(x).dtype == fake(node).dtype and same_shape:
        return b[x]
    return pointwise(b, node, [x], dtype_name(fake(x).dtype), lambda v: v)


@rule(aten.addcmul.default)
def _addcmul(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    value = constant(a["value"], dtype)
    operands = [a["self"], a["tensor1"], a["tensor2"]]
    return pointwise(b, node, operands, dtype, lambda x, y, z: x + value * y * z)


@rule(aten.addcdiv.default)
def _addcdiv(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    value = constant(a["value"], dtype)
    operands = [a["self"], a["tensor1"], a["tensor2"]]
    return pointwise(b, node, operands, dtype, lambda x, y, z: x + value * y / z)


@rule(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    operands = [a["self"], a["end"], a["weight"]]
    return pointwise(b, node, operands, dtype_name(fake(node).dtype), lambda x, y, w: x + w * (y - x))


@rule(aten.glu.default)
def _glu(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dim = a["dim"] % fake(node).dim()

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        half = k.size(fake(node).shape[dim])

        def element(*i: Expr) -> Expr:
            gate = x(*(index + half if d == dim else index for d, index in enumerate(i)))
            return x(*i) * tirx.sigmoid(gate)

        return element

    return b.elements(node, [a["self"]], body)
