"""Operators on each element: arithmetic, comparison, activations, casts, selection.

Operands broadcast and take the type that torch gives the operation. Transcendental functions are TVM's intrinsics here;
the schedule makes polynomials of them (`schedule_math.py`), once nothing is inlined any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from tvm import te, tirx

from ..builder import Builder, Kernel, dtype_name, fake
from .registry import aten, rule

Expr = Any
Unary = Callable[[Expr], Expr]
Binary = Callable[[Expr, Expr], Expr]


def constant(value: Any, dtype: str) -> Expr:
    """A Python number as a TIR constant of a type (booleans and infinities too)."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    if dtype.startswith(("int", "uint")):
        return tirx.const(int(value), dtype)
    return tirx.const(float(value), dtype)


def equal(x: Expr, number: Any) -> Expr:
    """Whether an expression is a number (an int or another expression)."""
    return tirx.EQ(x, constant(number, str(x.ty.dtype)) if isinstance(number, (int, float)) else number)


def cast(x: Expr, dtype: str) -> Expr:
    """`x` as torch converts it: to bool means "not zero"."""
    own = str(x.ty.dtype)
    if own == dtype:
        return x
    if dtype == "bool":
        return tirx.NE(x, constant(0, own))
    return x.astype(dtype)


def read(k: Kernel, operand: Any, indices: tuple[Expr, ...], dtype: str) -> Expr:
    """An operand (tensor node, number or size) at broadcast indices, in a type."""
    if isinstance(operand, fx.Node):
        return cast(k.at(k.tensor(operand), indices, k.result), dtype)
    if isinstance(operand, sympy.Expr):
        return cast(k.size(operand), dtype)
    return constant(operand, dtype)


def common_dtype(*operands: Any) -> torch.dtype:
    """The type torch computes in."""
    values = [
        fake(o) if isinstance(o, fx.Node) else (1 if isinstance(o, sympy.Expr) else o) for o in operands
    ]
    result = values[0]
    if len(values) == 1:
        return result.dtype if isinstance(result, torch.Tensor) else torch.get_default_dtype()
    dtype = torch.result_type(values[0], values[1])
    for other in values[2:]:
        dtype = torch.promote_types(dtype, torch.result_type(values[0], other))
    return dtype


def pointwise(b: Builder, node: fx.Node, operands: list[Any], dtype: str, body: Callable[..., Expr]) -> Any:
    """Emit `body` of the operands' elements in `dtype`; the result is cast to the node's type."""
    result = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        def element(*indices: Expr) -> Expr:
            return cast(body(*(read(k, o, indices, dtype) for o in operands)), result)

        for operand in operands:
            if isinstance(operand, fx.Node):
                k.tensor(operand)
        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    dtype = str(x.ty.dtype)
    if approximate == "none":
        return x * constant(0.5, dtype) * (constant(1, dtype) + tirx.erf(x * constant(math.sqrt(0.5), dtype)))
    # 0.5 (1 + tirx.tanh(a)) = sigmoid(2 a)
    cubic = constant(1, dtype) + constant(0.044715, dtype) * x * x
    return x * tirx.sigmoid(constant(2 * math.sqrt(2 / math.pi), dtype) * x * cubic)


def _sign(x: Expr) -> Expr:
    dtype = str(x.ty.dtype)
    zero, one = constant(0, dtype), constant(1, dtype)
    return tirx.Select(
        x > zero, one, tirx.Select(x < zero, constant(-1, dtype), x if "float" in dtype else zero)
    )


def _not(x: Expr) -> Expr:
    return tirx.Not(x) if str(x.ty.dtype) == "bool" else tirx.bitwise_not(x)


_UNARY: dict[Any, Unary] = {
    aten.abs.default: lambda x: tirx.abs(x),
    aten.neg.default: lambda x: constant(0, str(x.ty.dtype)) - x if "int" in str(x.ty.dtype) else -x,
    aten.exp.default: tirx.exp,
    aten.exp2.default: lambda x: tirx.exp(x * constant(math.log(2), str(x.ty.dtype))),
    aten.expm1.default: lambda x: tirx.exp(x) - constant(1, str(x.ty.dtype)),
    aten.log.default: tirx.log,
    aten.log2.default: tirx.log2,
    aten.log10.default: tirx.log10,
    aten.log1p.default: lambda x: tirx.log1p(x),
    aten.sqrt.default: tirx.sqrt,
    aten.rsqrt.default: lambda x: constant(1, str(x.ty.dtype)) / tirx.sqrt(x),
    aten.reciprocal.default: lambda x: constant(1, str(x.ty.dtype)) / x,
    aten.square.default: lambda x: x * x,
    aten.sin.default: tirx.sin,
    aten.cos.default: tirx.cos,
    aten.tan.default: tirx.tan,
    aten.asin.default: tirx.asin,
    aten.acos.default: tirx.acos,
    aten.atan.default: tirx.atan,
    aten.sinh.default: tirx.sinh,
    aten.cosh.default: tirx.cosh,
    aten.tanh.default: tirx.tanh,
    aten.sigmoid.default: tirx.sigmoid,
    aten.erf.default: tirx.erf,
    aten.relu.default: lambda x: tirx.max(x, constant(0, str(x.ty.dtype))),
    aten.relu6.default: lambda x: tirx.min(
        tirx.max(x, constant(0, str(x.ty.dtype))), constant(6, str(x.ty.dtype))
    ),
    aten.silu.default: lambda x: x * tirx.sigmoid(x),
    aten.floor.default: tirx.floor,
    aten.ceil.default: tirx.ceil,
    aten.trunc.default: tirx.trunc,
    aten.round.default: tirx.nearbyint,
    aten.sign.default: _sign,
    aten.bitwise_not.default: _not,
    aten.isnan.default: tirx.isnan,
    aten.isinf.default: tirx.isinf,
}

_ROUNDING = (aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default)


def _make_unary(target: Any, function: Unary) -> None:
    @rule(target)
    def made(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
        own, result = fake(a["self"]).dtype, fake(node).dtype
        if target in _ROUNDING and not own.is_floating_point:
            return b[a["self"]]
        # torch computes sin and the like of integers in the result's type.
        dtype = own if result == torch.bool or not result.is_floating_point else result
        if (
            result == torch.bool
            and target in (aten.isnan.default, aten.isinf.default)
            and not own.is_floating_point
        ):
            return pointwise(b, node, [a["self"]], dtype_name(own), lambda x: constant(0, "bool"))
        return pointwise(b, node, [a["self"]], dtype_name(dtype), function)


for _target, _function in _UNARY.items():
    _make_unary(_target, _function)


@rule(aten.logical_not.default)
def _logical_not(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(b, node, [a["self"]], "bool", tirx.Not)


@rule(aten.gelu.default)
def _gelu_rule(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    return pointwise(b, node, [a["self"]], dtype, lambda x: _gelu(x, a["approximate"]))


def _log1p_exp(x: Expr) -> Expr:
    """log(1 + e^x) without overflow: max(x, 0) + log1p(e^-|x|)."""
    zero, one = constant(0, str(x.ty.dtype)), constant(1, str(x.ty.dtype))
    return tirx.max(x, zero) + tirx.log(one + tirx.exp(zero - tirx.abs(x)))


@rule(aten.softplus.default)
def _softplus(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def body(x: Expr) -> Expr:
        beta, threshold = constant(a["beta"], dtype), constant(a["threshold"], dtype)
        return tirx.Select(x * beta > threshold, x, _log1p_exp(x * beta) / beta)

    return pointwise(b, node, [a["self"]], dtype, body)


@rule(aten.leaky_relu.default)
def _leaky_relu(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    slope = constant(a["negative_slope"], dtype)
    return pointwise(b, node, [a["self"]], dtype, lambda x: tirx.Select(x > constant(0, dtype), x, x * slope))


@rule(aten.elu.default)
def _elu(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = dtype_name(fake(node).dtype)
    alpha, scale, inner = (constant(a[name], dtype) for name in ("alpha", "scale", "input_scale"))
    one, zero = constant(1, dtype), constant(0, dtype)
    return pointwise(
        b, node, [a["self"]], dtype,
        lambda x: tirx.Select(x > zero, x * scale, alpha * scale * (tirx.exp(tirx.min(x, zero) * inner) - one)),
    )  # fmt: skip


@rule(aten.hardtanh.default)
def _hardtanh(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _clamped(b, node, a["self"], a["min_val"], a["max_val"])


@rule(aten.hardsigmoid.default)
def _hardsigmoid(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(b, node, [a["self"]], dtype_name(fake(node).dtype), _hard)


@rule(aten.hardswish.default)
def _hardswish(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(b, node, [a["self"]], dtype_name(fake(node).dtype), lambda x: x * _hard(x))


def _hard(x: Expr) -> Expr:
    dtype = str(x.ty.dtype)
    shifted = tirx.max(x + constant(3, dtype), constant(0, dtype))
    return tirx.min(shifted, constant(6, dtype)) / constant(6, dtype)


@rule(aten.mish.default)
def _mish(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return pointwise(
        b, node, [a["self"]], dtype_name(fake(node).dtype), lambda x: x * tirx.tanh(_log1p_exp(x))
    )


@rule(aten.clamp.default, aten.clamp.Tensor)
def _clamp(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _clamped(b, node, a["self"], a["min"], a["max"])


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _clamped(b, node, a["self"], a["min"], None)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _clamped(b, node, a["self"], None, a["max"])


def _clamped(b: Builder, node: fx.Node, x: fx.Node, low: Any, high: Any) -> Any:
    given = [v for v in (low, high) if v is not None]

    def body(x: Expr, *bounds: Expr) -> Expr:
        rest = list(bounds)
        if low is not None:
            x = tirx.max(x, rest.pop(0))
        return tirx.min(x, rest.pop(0)) if high is not None else x

    return pointwise(b, node, [x, *given], dtype_name(fake(node).dtype), body)


# ---- two operands


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
