"""Sparse matrices decoded by standard ONNX operators, one builder for each layout of `compiler/dialect/sparse_packing`.

Each takes the call of a sparse linear and returns the matrix `[height, width]`, float32 and not yet scaled, with the
rows and columns that padding added.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...compiler.dialect.packing import LANES, ceil_to
from ...compiler.dialect.sparse_blocks import BLOCKS
from ...compiler.dialect.sparse_groups import GROUPS
from ...compiler.dialect.sparse_windows import WINDOW
from .body import Body
from .function_call import Call

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


def sparse_matrix(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]`; codes are scaled."""
    layout = call.attributes["layout"]
    height = ceil_to(rows, LANES)
    if layout == "windows":
        matrix = _windows(body, call, height, k)
    elif layout == "panels":
        matrix = _panels(body, call)
    elif layout in GROUPS:
        matrix = _groups(body, call, layout)
    elif layout == "1x4":
        matrix = _fours(body, call)
    elif layout in BLOCKS:
        matrix = _columns(body, call, layout, height, k)
    else:
        matrix = _bitmask(body, call)
    matrix = body.slice(body.slice(matrix, 0, k, 1), 0, rows, 0)
    return matrix if call.inputs.get("scale") is None else body("Mul", matrix, _scale(body, call, rows, k))


def _scale(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """Scales of the rows, `[rows, 1]` or `[rows, k]`."""
    blocks, groups = call.size("scale", 0), call.size("scale", 1)
    group, multiplier = call.attributes["group_size"], call.attributes["scale_multiplier"]
    scale = body.floats(body.reshape(body.transpose(call["scale"], 0, 2, 1), blocks * LANES, groups))
    if multiplier != 1.0:
        scale = body("Mul", scale, body.real(multiplier))
    scale = body.slice(scale, 0, rows, 0)
    if not group:
        return scale
    spread = body("Expand", body.reshape(scale, rows, groups, 1), body.ints(rows, groups, group))
    return body.slice(body.reshape(spread, rows, groups * group), 0, k, 1)


def _whole(body: Body, number: int, dtype: type = np.int64) -> ir.Value:
    return body.constant(np.array(number, dtype=dtype))


def _filled(body: Body, number: int, size: int) -> ir.Value:
    """An int64 vector of one number."""
    return body("ConstantOfShape", body.ints(size), value=ir.tensor(np.array([number], dtype=np.int64)))


def _empty(body: Body, *sizes: int) -> ir.Value:
    """Zeros, float32."""
    return body("ConstantOfShape", body.ints(*sizes))


def _bits(body: Body, call: Call) -> ir.Value:
    """The mask's bits, int32, one after the other."""
    places = body("Unsqueeze", call["places"], body.ints(2))
    shifts = body.constant(np.arange(8, dtype=np.uint8))
    shifted = body("BitShift", places, shifts, direction="RIGHT")
    return body.cast(body.reshape(body("BitwiseAnd", shifted, _whole(body, 1, np.uint8)), -1), INT32)


def _numbers(body: Body, call: Call, values: ir.Value) -> ir.Value:
    """Stored values as float32."""
    if call["values"].dtype != ir.DataType.UINT16:
        return body.floats(values)
    # A bfloat16 is sign, 8 bits of exponent, 7 of mantissa; the smallest exponent has no leading one.
    word = body.cast(values, INT32)
    step = _whole(body, 128, np.int32)
    top, low = body("Div", word, step), body("Mod", word, step)
    powers = np.array([2.0 ** (max(e, 1) - 127) for e in range(255)] + [0.0], dtype=np.float32)
    table = body.constant(np.concatenate([powers, -powers]))
    leading = body.constant(np.array([0.0] + [1.0] * 255, dtype=np.float32))
    one = body("Gather", leading, body("Mod", top, _whole(body, 256, np.int32)), axis=0)
    mantissa = body("Add", one, body("Mul", body.floats(low), body.real(1 / 128)))
    return body("Mul", body("Gather", table, top, axis=0), mantissa)


def _where_set(body: Body, there: ir.Value, found: ir.Value) -> ir.Value:
    return body("Where", body.cast(there, ir.DataType.BOOL), found, body.real(0.0))


def _rank(body: Body, there: ir.Value) -> ir.Value:
    """The index of the value of each set bit; that of a bit in front of it, or 0, where it is not set."""
    before = body("CumSum", there, _whole(body, 0))
    return body("Max", body("Sub", before, _whole(body, 1, np.int32)), _whole(body, 0, np.int32))


def _bitmask(body: Body, call: Call) -> ir.Value:
    there = _bits(body, call)
    shape = call.size("places", 0), 8 * call.size("places", 1)
    if call.attributes.get("bits") == 4:
        return body.reshape(_where_set(body, there, _nibbles(body, call, there)), *shape)
    found = body("Gather", call["values"], _rank(body, there), axis=0)
    return body.reshape(_where_set(body, there, _numbers(body, call, found)), *shape)


def _nibbles(body: Body, call: Call, there: ir.Value) -> ir.Value:
    """The int4 value of each set bit, as float32: every word of 64 bits begins a byte."""
    one, two = (_whole(body, v, np.int32) for v in (1, 2))
    words = body.reshape(there, -1, 64)
    inside = body("Max", body("Sub", body("CumSum", words, _whole(body, 1)), one), _whole(body, 0, np.int32))
    taken = body("Div", body("Add", body("ReduceSum", words, body.ints(1), keepdims=1), one), two)
    starts = body("CumSum", taken, _whole(body, 0), exclusive=1)
    nibble = body.reshape(body("Add", body("Mul", starts, two), inside), -1)
    packed = body.cast(body("Gather", call["values"], body("Div", nibble, two), axis=0), INT32)
    sixteen = _whole(body, 16, np.int32)
    high = body.cast(body("Mod", nibble, two), ir.DataType.BOOL)
    code = body("Where", high, body("Div", packed, sixteen), body("Mod", packed, sixteen))
    negative = body("Greater", code, _whole(body, 7, np.int32))
    return body.floats(body("Where", negative, body("Sub", code, sixteen), code))


def _panels(body: Body, call: Call) -> ir.Value:
    pairs, words = call.size("places", 0), call.size("places", 1) // 16
    split = body.transpose(body.reshape(_bits(body, call), pairs, words, 2, 4 * LANES), 2, 0, 1, 3)
    there = body.reshape(split, 2, pairs, -1)
    one, sixteen = (_whole(body, v, np.int32) for v in (1, 16))
    rank = body("Sub", body("CumSum", there, _whole(body, 2)), one)
    starts = body.reshape(body.slice(call["offsets"], 0, pairs, 0), 1, pairs, 1)
    index = body("Max", body("Add", rank, starts), _whole(body, 0, np.int32))
    packed = body.cast(body("Gather", call["values"], index, axis=0), INT32)
    # Panel 0 of a pair: the low nibble; panel 1: the high one.
    shifted = body("Div", packed, body.constant(np.array([1, 16], dtype=np.int32).reshape(2, 1, 1)))
    code = body("Mod", shifted, sixteen)
    signed = body("Where", body("Greater", code, _whole(body, 7, np.int32)), body("Sub", code, sixteen), code)
    codes = _where_set(body, there, body.floats(signed))
    whole = body.transpose(body.reshape(codes, 2, pairs, words, LANES, 4), 1, 0, 3, 2, 4)
    return body.reshape(whole, pairs * 2 * LANES, 4 * words)


def _fours(body: Body, call: Call) -> ir.Value:
    there = _bits(body, call)
    blocks = body.reshape(call["values"], -1, 4)
    found = body.floats(body("Gather", blocks, _rank(body, there), axis=0))
    matrix = _where_set(body, body("Unsqueeze", there, body.ints(1)), found)
    return body.reshape(matrix, call.size("places", 0), 32 * call.size("places", 1))


def _owners(body: Body, ends: ir.Value, count: int, size: int) -> ir.Value:
    """For each of `size` things which of `count` lists holds it, int64: `ends` `[count]` is where the lists end;
    `count` for what is behind the last."""
    zeros, ones = _filled(body, 0, size + 1), _filled(body, 1, count)
    steps = body("ScatterElements", zeros, ends, ones, axis=0, reduction="add")
    return body.slice(body("CumSum", steps, _whole(body, 0)), 0, size, 0)


def _windows(body: Body, call: Call, height: int, k: int) -> ir.Value:
    windows, size = ceil_to(k, WINDOW) // WINDOW, call.size("values", 0)
    heads = height * windows
    counts = body.cast(body.slice(call["places"], 0, heads, 0), INT64)
    # Places are as many as values or more; what is behind the last value belongs to one list more.
    index = body.cast(body.slice(call["places"], heads, heads + size, 0), INT64)
    owner = _owners(body, body("CumSum", counts, _whole(body, 0)), heads, size)
    flat = body("Add", body("Mul", owner, _whole(body, WINDOW)), index)
    empty = _empty(body, (heads + 1) * WINDOW)
    filled = body("ScatterElements", empty, flat, body.floats(call["values"]), axis=0)
    whole = body.reshape(body.slice(filled, 0, heads * WINDOW, 0), height // LANES, windows, LANES, WINDOW)
    return body.reshape(body.transpose(whole, 0, 2, 1, 3), height, windows * WINDOW)


def _groups(body: Body, call: Call, layout: str) -> ir.Value:
    some, of, width = GROUPS[layout]
    height, count = call.size("values", 0), call.size("values", 1) * 64
    parts = body.cast(body.reshape(call["places"], -1, width), INT32)
    factors = body.constant(np.array([256**i for i in range(width)], dtype=np.int32))
    word = body("ReduceSum", body("Mul", parts, factors), body.ints(1), keepdims=1)
    shifts = body.constant(np.array([2 ** (width * j) for j in range(8)], dtype=np.int32))
    index = body("Mod", body("Div", word, shifts), _whole(body, 1 << width, np.int32))
    index = body.cast(body.reshape(index, -1, some), INT64)
    values = body.reshape(body.floats(call["values"]), -1, some)
    empty = _empty(body, height * count // some, of)
    filled = body("ScatterElements", empty, index, values, axis=1)
    return body.reshape(filled, height, count // some * of)


def _columns(body: Body, call: Call, layout: str, height: int, k: int) -> ir.Value:
    width = BLOCKS[layout][1]
    panels, columns, size = height // LANES, ceil_to(k, width) // width, call.size("places", 0)
    ends = body.cast(body.slice(call["offsets"], 1, panels + 1, 0), INT64)
    owner = _owners(body, ends, panels, size)
    flat = body("Add", body("Mul", owner, _whole(body, columns)), body.cast(call["places"], INT64))
    empty = _empty(body, panels * columns + 1, LANES, width)
    values = _numbers(body, call, call["values"])
    filled = body("ScatterND", empty, body("Unsqueeze", flat, body.ints(1)), values)
    whole = body.reshape(body.slice(filled, 0, panels * columns, 0), panels, columns, LANES, width)
    return body.reshape(body.transpose(whole, 0, 2, 1, 3), height, columns * width)
