"""ONNX bodies that decode weights of integers and dense panels, with outliers beside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...compiler.dialect.packing import LANES, zero_steps
from .body import Body
from .function_call import Call, Results


def byte(body: Body, value: int) -> ir.Value:
    """A uint8 scalar."""
    return body.constant(np.array(value, dtype=np.uint8))


def field(body: Body, packed: ir.Value, low: int, width: int) -> ir.Value:
    """Bits low..low+width-1 of each byte."""
    shifted = packed if low == 0 else body("BitShift", packed, byte(body, low), direction="RIGHT")
    return shifted if low + width == 8 else body("BitwiseAnd", shifted, byte(body, (1 << width) - 1))


def crop(body: Body, matrix: ir.Value, shape: tuple[int, int], rows: int, k: int) -> ir.Value:
    """A matrix of that shape without the columns and rows that padding added: `[rows, k]`."""
    if shape[1] != k:
        matrix = body.slice(matrix, 0, k, 1)
    return matrix if shape[0] == rows else body.slice(matrix, 0, rows, 0)


def integer_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The float32 matrix `[rows, k]` of integer codes of 2, 3, 4 or 8 bits, with their scales and zero points."""
    bits, group = call.attributes.get("bits", 8), call.attributes.get("group_size", 0)
    multiplier = call.attributes.get("scale_multiplier", 1.0)
    padded = call.size("weight", 0) * LANES
    codes, width = _codes(body, call, bits, padded)

    def per_group(name: str) -> ir.Value:
        values = body.transpose(body.floats(call[name]), 0, 2, 1)
        return body.reshape(values, padded, call.size(name, 1), 1)

    codes = body.reshape(codes, padded, width // group if group else 1, group or width)
    if call.inputs.get("zero") is not None:
        zero = per_group("zero")
        if zero_steps(bits) > 1:
            zero = body("Mul", zero, body.real(1 / zero_steps(bits)))
        codes = body("Sub", codes, zero)
    scale = per_group("scale")
    if multiplier != 1.0:
        scale = body("Mul", scale, body.real(multiplier))
    matrix = body.reshape(body("Mul", codes, scale), padded, width)
    return crop(body, matrix, (padded, width), rows, k)


def _codes(body: Body, call: Call, bits: int, rows: int) -> tuple[ir.Value, int]:
    """Signed codes of all padded rows as float32, and Kp: the result has `rows * Kp` elements in row order."""
    weight, blocks = call["weight"], call.size("weight", 1)
    if bits == 8:
        return body.floats(body.reshape(body.transpose(weight, 0, 2, 1, 3), rows, blocks * 4)), blocks * 4

    if bits == 3:
        planes = [body("Gather", weight, body.integer(p), axis=2) for p in range(3)]
        steps = [field(body, plane, low, 3) for plane in planes for low in (5, 2)]
        for i in range(2):
            sign = body("BitShift", field(body, planes[2], i, 1), byte(body, 2), direction="LEFT")
            steps.append(body("BitwiseOr", field(body, planes[i], 0, 2), sign))
    else:
        steps = [field(body, weight, bits * q, bits) for q in range(8 // bits)]
    half = 1 << (bits - 1)
    shifted = body("BitwiseXor", body.stack(steps, 2), byte(body, half))  # two's complement: code + half
    ordered = body.transpose(shifted, 0, 3, 1, 2, 4)
    width = blocks * len(steps) * 4
    return body("Sub", body.floats(body.reshape(ordered, rows, width)), body.real(float(half))), width


def dense_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The matrix float32 `[rows, k]` of panels `[blocks, k, 32]`."""
    height = call.size("weight", 0) * call.size("weight", 2)
    matrix = body.reshape(body("Transpose", call["weight"], perm=[0, 2, 1]), height, k)
    return crop(body, matrix, (height, k), rows, k)


def _outliers(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The outliers alone, float32 `[rows, k]`: sliced ELLPACK (`dialect/outlier_packing.py`) scattered into zeros."""
    panels, steps = call.size("offsets", 0) - 1, call.size("places", 0)
    count = panels * LANES
    one = body.integer(1)
    # The panel of a step: how many panels begin at or before it, the first one not counted.
    starts = body.cast(body.slice(call["offsets"], 1, panels, 0), ir.DataType.INT64)
    marks = body("Expand", one, body.ints(panels - 1))
    none = body.constant(np.zeros(steps + 1, dtype=np.int64))
    begun = body("ScatterElements", none, starts, marks, axis=0, reduction="add")
    panel = body.slice(body("CumSum", begun, body.integer(0)), 0, steps, 0)
    first = body("Mul", body("Unsqueeze", panel, body.ints(1)), body.ints(LANES))
    row = body("Add", first, body.constant(np.arange(LANES, dtype=np.int64)[None]))
    places = body.cast(call["places"], ir.DataType.INT64)
    index = body.reshape(body("Add", body("Mul", row, body.ints(k)), places), -1)
    values = body.reshape(body.floats(call["values"]), -1)
    if call.attributes["outlier_multiplier"] != 1.0:
        values = body("Mul", values, body.real(call.attributes["outlier_multiplier"]))
    zeros = body("Expand", body.real(0.0), body.ints(count * k))
    matrix = body.reshape(body("ScatterElements", zeros, index, values, axis=0, reduction="add"), count, k)
    return crop(body, matrix, (count, k), rows, k)


def outlier_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]` of integers and outliers."""
    return body("Add", integer_weight(body, call, rows, k), _outliers(body, call, rows, k))


def _experts_as_rows(body: Body, call: Call, name: str) -> ir.Value | None:
    """An input `[E, N, K]` of E experts as one matrix `[E N, K]`; None where it is absent."""
    held = call.get(name)
    if held is None:
        return None
    rows, last = call.size(name, 0) * call.size(name, 1), call.size(name, 2)
    flat = body.reshape(held, rows, last)
    flat.shape, flat.type = ir.Shape([rows, last]), held.type
    return flat


def dequantize_weight(call: Call, body: Body) -> Results:
    """`dequantize_weight`: ONNX's DequantizeLinear (block-wise where there are groups), or its arithmetic where zero
    points are fractions, which DequantizeLinear does not take."""
    if call.rank("scale") == 3:
        stacked = {name: _experts_as_rows(body, call, name) for name in ("codes", "scale", "zero")}
        (matrix,) = dequantize_weight(Call(stacked, call.attributes), body)
        return (body.reshape(matrix, *(call.size("codes", axis) for axis in range(3))),)
    codes, scale, zero, group = call["codes"], call["scale"], call.get("zero"), call.attributes["group_size"]
    if zero is not None and zero.dtype == ir.DataType.FLOAT:
        rows, width = (call.size("codes", axis) for axis in (0, 1))
        spread = [
            body.slice(body.reshape(body("Expand", body("Unsqueeze", v, body.ints(-1)), body.ints(1, 1, group)),
                                    rows, call.size(name, 1) * group), 0, width, 1)
            for name, v in (("zero", zero), ("scale", scale))
        ]  # fmt: skip
        return (body("Mul", body("Sub", body.floats(codes), spread[0]), spread[1]),)
    if group:
        return (body("DequantizeLinear", codes, scale, zero, axis=1, block_size=group),)
    flat = [None if v is None else body.reshape(v, call.size("codes", 0)) for v in (scale, zero)]
    return (body("DequantizeLinear", codes, *flat, axis=0),)


def dequantize_outliers(call: Call, body: Body) -> Results:
    """`dequantize_outliers`."""
    (dense,) = dequantize_weight(call, body)
    values = body.floats(call["values"])
    if call.attributes["multiplier"] != 1.0:
        values = body("Mul", values, body.real(call.attributes["multiplier"]))
    places = body.cast(call["places"], ir.DataType.INT64)
    return (body("ScatterElements", dense, places, values, axis=1, reduction="add"),)
