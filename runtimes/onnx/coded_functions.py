"""ONNX bodies that decode weights of table and small-float codes (`linear_coded`) and of additive codebooks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from ...compiler.dialect.element_formats import element_format, scale_values
from ...compiler.dialect.packing import LANES
from .body import Body
from .function_call import Call, Results
from .weight_functions import byte, crop, field


def _decoded(body: Body, call: Call, codes: ir.Value) -> ir.Value:
    """Values of codes in the call's `format`."""
    entries = call.inputs.get("table")
    if entries is None:
        # No code of a weight is NaN or infinity: finite entries keep padding, which meets zeros, finite too.
        values = element_format(call.attributes["format"]).values().nan_to_num(0.0, 0.0, 0.0)
        entries = body.constant(values.numpy().astype(np.float32))
    return body("Gather", entries, body.cast(codes, ir.DataType.INT32), axis=0)


def _decoded_scale(body: Body, call: Call, stored: ir.Value) -> ir.Value:
    """Values of scales as the call's `format` stores them."""
    form = element_format(call.attributes["format"])
    if form.scale == "float":
        return body.floats(stored)
    known = scale_values(torch.arange(256).to(torch.uint8), form, torch.float32).nan_to_num(0.0)
    return body("Gather", body.constant(known.numpy()), body.cast(stored, ir.DataType.INT32), axis=0)


def coded_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]` of `linear_coded`."""
    form, group = element_format(call.attributes["format"]), call.attributes["group_size"]
    blocks, steps = call.size("weight", 0), call.size("weight", 1)
    packed = call["weight"]

    if form.bits == 8:
        width = steps * 2
        codes = body.reshape(body.transpose(packed, 0, 2, 1, 3), blocks * LANES, width)
    elif form.bits == 4:
        width = steps * 8
        both = body.stack([field(body, packed, low, 4) for low in (0, 4)], 2)
        codes = body.reshape(body.transpose(both, 0, 3, 1, 2, 4), blocks * LANES, width)
    else:
        width = steps // 3 * 8
        words = body.transpose(body.reshape(packed, blocks, steps // 3, 3, LANES, 2), 0, 3, 1, 2, 4)
        words = body.reshape(words, blocks * LANES, steps // 3, 6)
        pairs, top = body.slice(words, 0, 4, 2), body.slice(words, 4, 6, 2)
        low = body.reshape(
            body.stack([field(body, pairs, low, 4) for low in (0, 4)], 3), blocks * LANES, width
        )
        parts = [field(body, top, low, 2) for low in (0, 2, 4, 6)]
        high = body.reshape(body.stack(parts, 3), blocks * LANES, width)
        codes = body("BitwiseOr", low, body("BitShift", high, byte(body, 4), direction="LEFT"))
    values = _decoded(body, call, codes)
    values = body.reshape(values, blocks * LANES, width // group if group else 1, group or width)
    scale = _decoded_scale(body, call, body.transpose(call["scale"], 0, 2, 1))
    scale = body.reshape(scale, blocks * LANES, call.size("scale", 1), 1)
    multiplier = call.attributes["scale_multiplier"]
    if multiplier != 1.0:
        scale = body("Mul", scale, body.real(multiplier))
    matrix = body.reshape(body("Mul", values, scale), blocks * LANES, width)
    return crop(body, matrix, (blocks * LANES, width), rows, k)


def _codebook_vectors(
    body: Body, call: Call, codes: ir.Value, rows: int, groups: int, count: int
) -> ir.Value:
    """Sums of the vectors that codes `[rows, groups, count]` choose: `[rows, 8 groups]`."""
    index = body.cast(codes, ir.DataType.INT32)
    total = None
    for m in range(count):
        chosen = body("Gather", index, body.integer(m), axis=2)
        book = body("Gather", call["codebooks"], body.integer(m), axis=0)
        part = body("Gather", body.floats(book), chosen, axis=0)
        total = part if total is None else body("Add", total, part)
    assert total is not None
    return body.reshape(total, rows, groups * 8)


def codebook_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]` of `linear_codebook`."""
    blocks, groups, lanes, count = (call.size("weight", axis) for axis in range(4))
    codes = body.reshape(body.transpose(call["weight"], 0, 2, 1, 3), blocks * lanes, groups, count)
    scale = body.reshape(call["scale"], blocks * lanes, 1)
    matrix = body("Mul", _codebook_vectors(body, call, codes, blocks * lanes, groups, count), scale)
    return crop(body, matrix, (blocks * lanes, groups * 8), rows, k)


def dequantize_coded(call: Call, body: Body) -> Results:
    """`dequantize_coded`."""
    group = call.attributes["group_size"]
    values = _decoded(body, call, call["codes"])
    scale = body("Mul", _decoded_scale(body, call, call["scale"]), call["multiplier"])
    if group:
        n, k, groups = call.size("codes", 0), call.size("codes", 1), call.size("scale", 1)
        spread = body("Expand", body.reshape(scale, n, groups, 1), body.ints(n, groups, group))
        scale = body.slice(body.reshape(spread, n, groups * group), 0, k, 1)
    return (body("Mul", values, scale),)


def dequantize_codebook(call: Call, body: Body) -> Results:
    """`dequantize_codebook`."""
    sizes = (call.size("codes", axis) for axis in range(3))
    vectors = _codebook_vectors(body, call, call["codes"], *sizes)
    matrix = body("Mul", vectors, body("Unsqueeze", call["scale"], body.ints(1)))
    return (body.slice(matrix, 0, call.attributes["k"], 1),)
