"""Operators with one operand: rounding, transcendental and activation functions, and clamps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import tirx

from ..builder import Builder, dtype_name, fake
from .pointwise import constant, pointwise
from .registry import aten, rule

Expr = Any
Unary = Callable[[Expr], Expr]
Binary = Callable[[Expr, Expr], Expr]


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
