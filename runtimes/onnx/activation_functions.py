"""ONNX bodies of what rounds activations: integer codes, FP8 codes, and the transforms in front of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.dialect.packing import ceil_to
from ...compiler.dialect.quantization import LEAST_SCALE, levels
from ...compiler.dialect.quantization_fp8 import LARGEST, NAN_CODE
from ...compiler.hadamard import steps
from ...compiler.hadamard_orders import signs
from .body import Body
from .function_call import Call, Results


def quantize(
    body: Body, x: ir.Value, params: ir.Value | None, axes: Sequence[int], bits: int = 8
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Integer codes of x (as float32), their scale and zero point: from `params`, or from the range over `axes`."""
    zero, largest = body.real(0.0), body.real(levels(bits))
    if params is None:
        over = body.ints(*axes)
        low = body("Min", body("ReduceMin", x, over, keepdims=1), zero)
        high = body("Max", body("ReduceMax", x, over, keepdims=1), zero)
        spread = body("Div", body("Sub", high, low), largest)
        scale = body("Where", body("GreaterOrEqual", spread, body.real(LEAST_SCALE)), spread, body.real(1.0))
        offset = body("Clip", body("Round", body("Div", body("Neg", low), scale)), zero, largest)
    else:
        scale = body("Gather", params, body.integer(0), axis=0)
        offset = body("Gather", params, body.integer(1), axis=0)
    # 1 / scale, spelled so that ONNX Runtime does not make x / scale of it, which rounds elsewhere.
    half = body.real(0.5)
    inverse = body("Div", half, body("Mul", scale, half))
    rounded = body("Round", body("Mul", x, inverse))
    return body("Clip", body("Add", rounded, offset), zero, largest), scale, offset


def _quantize_activation(body: Body, call: Call, x: ir.Value) -> Results:
    """Codes of x and their pairs (scale, zero point), by the inputs and attributes that `call` has for a quantizer."""
    params = call.get("params")
    x = _transformed(body, call, x)
    codes, scale, offset = quantize(body, x, params, [-1], call.attributes["bits"])
    pair = body("Identity", params) if params is not None else body("Concat", scale, offset, axis=-1)
    return _padded_codes(body, call, codes), pair


def _transformed(body: Body, call: Call, x: ir.Value) -> ir.Value:
    """`((x - shift) * scale) H` of a quantizer."""
    shift, factor = call.get("shift"), call.get("scale")
    x = x if shift is None else body("Sub", x, shift)
    x = x if factor is None else body("Mul", x, factor)
    return _hadamard(body, x, call.attributes["hadamard"], False) if call.attributes["hadamard"] else x


def _padded_codes(body: Body, call: Call, codes: ir.Value) -> ir.Value:
    """Codes (as floats) as bytes, padded to the call's `align`."""
    width = call.size("x", -1)
    padding = ceil_to(width, call.attributes["align"]) - width
    if padding:
        codes = body("Pad", codes, body.ints(0, padding), body.real(0.0), body.ints(-1))
    return body.cast(codes, ir.DataType.UINT8)


def _scaled_fp8(body: Body, x: ir.Value, params: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """`clip(x / scale)` in the range of E4M3, not rounded yet, and the scale: the given one, or one per token."""
    if params is None:
        largest = body("ReduceMax", body("Abs", x), body.ints(-1), keepdims=1)
        scale = body("Div", largest, body.real(LARGEST))
        scale = body("Where", body("Less", scale, body.real(LEAST_SCALE)), body.real(1.0), scale)
    else:
        scale = params
    # 1 / scale, spelled so that ONNX Runtime does not make x / scale of it, which rounds elsewhere.
    two = body.real(2.0)
    y = body("Mul", x, body("Div", two, body("Mul", scale, two)))
    return body("Clip", y, body.real(-LARGEST), body.real(LARGEST)), scale


def _codes_fp8(body: Body, y: ir.Value) -> ir.Value:
    """E4M3 codes (as floats) of y: with m steps of 2^(e - 3), 8 (e + 6) + m, which carries where m is rounded up to 16.

    e is the exponent of the magnitude, -6 below 2^-6. Where it is one too large, just below a power of two, the
    coarser steps round to the same value.
    """
    magnitude = body("Abs", y)
    logarithm = body("Mul", body("Log", magnitude), body.real(1 / math.log(2)))
    exponent = body(
        "Clip", body("Floor", body("Add", logarithm, body.real(0.01))), body.real(-6.0), body.real(8.0)
    )
    place = body("Add", exponent, body.real(6.0))
    steps = body.constant(np.ldexp(np.float32(1), 9 - np.arange(15)).astype(np.float32))
    step = body("Gather", steps, body.cast(place, ir.DataType.INT32), axis=0)
    code = body("Add", body("Mul", place, body.real(8.0)), body("Round", body("Mul", magnitude, step)))
    sign = body("Where", body("Less", y, body.real(0.0)), body.real(128.0), body.real(0.0))
    return body("Where", body("IsNaN", y), body.real(float(NAN_CODE)), body("Add", code, sign))


def _hadamard(body: Body, x: ir.Value, orders: Sequence[int], transpose: bool) -> ir.Value:
    """One small matrix product for each factor; the scale is in the first."""
    factors, inner = steps(orders), math.prod(orders)
    scale = inner**-0.5
    y = x
    for order in factors:
        inner //= order
        matrix = (signs(order) * scale).astype(np.float32)
        matrix = matrix.T if transpose else matrix
        scale = 1.0
        if inner == 1:
            y = body("MatMul", body.reshape(y, -1, order), body.constant(np.ascontiguousarray(matrix)))
        else:
            left = body.constant(np.ascontiguousarray(matrix.T))
            y = body("MatMul", left, body.reshape(y, -1, order, inner))
    return body("Reshape", y, body("Shape", x)) if factors else body("Identity", x)


def _norm(body: Body, call: Call) -> Results:
    x, residual, weight, bias = call["x"], call.get("residual"), call.get("weight"), call.get("bias")
    total = body("Identity", x) if residual is None else body("Add", x, residual)
    eps = call.attributes["eps"]
    if call.attributes["kind"] == "layer":
        if weight is None:
            weight = body.constant(np.ones(call.size("x", -1), dtype=np.float32))
        return total, body("LayerNormalization", total, weight, bias, axis=-1, epsilon=eps)
    mean = body("ReduceMean", body("Pow", total, body.real(2.0)), body.ints(-1), keepdims=1)
    y = body("Div", total, body("Sqrt", body("Add", mean, body.real(eps))))
    y = y if weight is None else body("Mul", y, weight)
    return total, y if bias is None else body("Add", y, bias)


def quantize_activation(call: Call, body: Body) -> Results:
    """`quantize_activation`."""
    return _quantize_activation(body, call, call["x"])


def quantize_activation_fp8(call: Call, body: Body) -> Results:
    """`quantize_activation_fp8`."""
    params = call.get("params")
    y, scale = _scaled_fp8(body, _transformed(body, call, call["x"]), params)
    found = body("Identity", params) if params is not None else scale
    return _padded_codes(body, call, _codes_fp8(body, y)), found


def quantize_dequantize(call: Call, body: Body) -> Results:
    """`quantize_dequantize`."""
    axes = [-1] if call.attributes["granularity"] == "token" else range(1, call.rank("x"))
    codes, scale, offset = quantize(body, call["x"], call.get("params"), axes, call.attributes["bits"])
    return (body("Mul", body("Sub", codes, offset), scale),)


def quantize_dequantize_fp8(call: Call, body: Body) -> Results:
    """`quantize_dequantize_fp8`: ONNX's own conversion."""
    y, scale = _scaled_fp8(body, call["x"], call.get("params"))
    rounded = body.floats(body.cast(y, ir.DataType.FLOAT8E4M3FN))
    return (body("Mul", rounded, scale),)


def hadamard(call: Call, body: Body) -> Results:
    """`hadamard`."""
    return (_hadamard(body, call["x"], call.attributes["orders"], bool(call.attributes["transpose"])),)


def norm(call: Call, body: Body) -> Results:
    """`norm`."""
    return _norm(body, call)


def norm_quantize(call: Call, body: Body) -> Results:
    """`norm_quantize`."""
    total, y = _norm(body, call)
    return (total, y, *_quantize_activation(body, call, y))


def dequantized(body: Body, call: Call) -> ir.Value:
    """The activations that codes `u` and pairs `params` stand for."""
    codes = body.floats(body.slice(call["u"], 0, call.attributes["k"], -1))
    scale, zero = (body.slice(call["params"], i, i + 1, -1) for i in (0, 1))
    return body("Mul", body("Sub", codes, zero), scale)
