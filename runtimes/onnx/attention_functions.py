"""ONNX bodies of attention, rotary embedding, and caches of keys and values as codes."""

from __future__ import annotations

import math

import onnx_ir as ir

from ...compiler.dialect.packing import ceil_to
from .activation_functions import quantize_activation
from .body import Body
from .function_call import Call, Results
from .weight_functions import byte, field


def attention(call: Call, body: Body) -> Results:
    """`attention`."""
    at = call.attributes
    heads, kv_heads, softcap = at["heads"], at["kv_heads"], at["softcap"]

    def chosen(name: str, count: int) -> ir.Value:
        start, x = at[f"{name}_start"], call[name]
        return x if start == 0 and call.size(name, 2) == count else body.slice(x, start, start + count, 2)

    def repeated(x: ir.Value, middle: int) -> ir.Value:
        if kv_heads == heads:
            return x
        wide = body("Expand", body("Unsqueeze", x, body.ints(2)), body.ints(1, 1, heads // kv_heads, 1, 1))
        sizes = (0, heads, middle, -1) if middle != -1 else (0, heads, -1, call.size("v", 3))
        return body.reshape(wide, *sizes)

    queries = body.transpose(chosen("q", heads), 0, 2, 1, 3)
    keys = repeated(body.transpose(chosen("k", kv_heads), 0, 2, 3, 1), call.size("k", 3))
    values = repeated(body.transpose(chosen("v", kv_heads), 0, 2, 1, 3), -1)
    logits = body("Mul", body("MatMul", queries, keys), body.real(at["scale"]))
    if softcap > 0:
        cap = body.real(softcap)
        logits = body("Mul", body("Tanh", body("Div", logits, cap)), cap)
    infinite = body.real(-math.inf)
    mask = call.get("mask")
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        logits = body("Where", mask, logits, infinite)
    elif mask is not None:
        logits = body("Add", logits, mask)
    if at["causal"]:
        zero, one = (body.integer(v) for v in (0, 1))
        rows, columns = (
            body("Range", zero, body("Squeeze", body("Shape", call[name], start=1, end=2)), one)
            for name in ("q", "k")
        )
        visible = body("LessOrEqual", columns, body("Unsqueeze", rows, body.ints(1)))
        logits = body("Where", visible, logits, infinite)
    if mask is None:
        weights = body("Softmax", logits, axis=-1)
    else:  # only a mask can hide all keys from a query; such a row is 0 instead of NaN
        blind = body("Equal", body("ReduceMax", logits, body.ints(-1), keepdims=1), infinite)
        weights = body("Softmax", body("Where", blind, body.real(0.0), logits), axis=-1)
        weights = body("Where", blind, body.real(0.0), weights)
    return (body.transpose(body("MatMul", weights, values), 0, 2, 1, 3),)


def attention_cached(call: Call, body: Body) -> Results:
    """`attention_cached`: the body of `attention` on decoded keys and values."""
    at = dict(call.attributes)
    depth, width, bits, group = (at.pop(name) for name in ("depth", "value_depth", "bits", "group"))
    read = {}
    for name, size in (("k", depth), ("v", width)):
        decoded = _cached(body, call[name], call[f"{name}_params"], 4, size, bits, group)
        moved = body.transpose(decoded, 0, 2, 1, 3)
        moved.shape = ir.Shape([None, None, at["kv_heads"], size])
        moved.type = ir.TensorType(ir.DataType.FLOAT)
        read[name] = moved
    inputs = {"q": call["q"], **read, "mask": call.get("mask")}
    return attention(Call(inputs, {**at, "k_start": 0, "v_start": 0}), body)


def _cached(
    body: Body, codes: ir.Value, params: ir.Value, rank: int, depth: int, bits: int, group: int
) -> ir.Value:
    """Keys or values `[..., depth]` as float32 from codes of that rank and their pairs (`dialect/cache_packing.py`)."""
    if bits == 4:
        lead = [0] * (rank - 1)
        blocks = body.reshape(codes, *lead, -1, 16)
        both = body.stack([field(body, blocks, low, 4) for low in (0, 4)], rank)
        codes = body.reshape(both, *lead, ceil_to(depth, 32))
    u = body.floats(body.slice(codes, 0, depth, -1))
    lead = [0] * (rank - 1)
    if group:
        u, params = (body.reshape(y, *lead, depth // group, n) for y, n in ((u, group), (params, 2)))
    scale, zero = (body.slice(params, i, i + 1, -1) for i in (0, 1))
    x = body("Mul", body("Sub", u, zero), scale)
    return body.reshape(x, *lead, depth) if group else x


def quantize_cache(call: Call, body: Body) -> Results:
    """`quantize_cache`."""
    bits = call.attributes["bits"]
    rounding = {"align": 32, "bits": bits, "hadamard": call.attributes["hadamard"]}
    given = {"x": call["x"], "params": None, "shift": call.get("shift"), "scale": None}
    lead, group = [0] * (call.rank("x") - 1), call.attributes["group"]
    depth = call.size("x", -1)
    if group:  # a group is a row of its own
        rows = body.reshape(call["x"], *lead, depth // group, group)
        rows.shape = ir.Shape([*[None] * (len(lead) + 1), group])
        rows.type = ir.TensorType(ir.DataType.FLOAT)
        given["x"] = rows
    u, params = quantize_activation(Call(given, rounding), body)
    if group:
        u, params = body.reshape(u, *lead, depth), body.reshape(params, *lead, 2 * (depth // group))
    if bits == 8:
        return u, params
    blocks = body.reshape(u, *lead, -1, 2, 16)
    low, high = (body("Gather", blocks, body.integer(i), axis=len(lead) + 1) for i in (0, 1))
    both = body("BitwiseOr", low, body("BitShift", high, byte(body, 4), direction="LEFT"))
    return body.reshape(both, *lead, ceil_to(depth, 32) // 2), params


def dequantize_cache(call: Call, body: Body) -> Results:
    """`dequantize_cache`."""
    depth, bits, group = (call.attributes[name] for name in ("depth", "bits", "group"))
    return (_cached(body, call["codes"], call["params"], call.rank("codes"), depth, bits, group),)


def rotary(call: Call, body: Body) -> Results:
    """`rotary`."""
    x, at = call["x"], call.attributes
    axis, depth, width = at["head_dim_index"], call.size("x", 3), call.size("cos", 3)
    total = call.size("x", axis)
    heads = total if at["heads"] < 0 else at["heads"]
    turned = x if heads == total else body.slice(x, 0, heads, axis)
    part = turned if width == depth else body.slice(turned, 0, width, 3)
    if at["interleaved"]:
        odd, even = (body.slice(part, start, width, 3, step=2) for start in (1, 0))
        half = body.reshape(body.stack([body("Neg", odd), even], 4), 0, 0, 0, width)
    else:
        first, second = body.slice(part, 0, width // 2, 3), body.slice(part, width // 2, width, 3)
        half = body("Concat", body("Neg", second), first, axis=3)
    y = body("Add", body("Mul", part, call["cos"]), body("Mul", half, call["sin"]))
    if width != depth:
        y = body("Concat", y, body.slice(turned, width, depth, 3), axis=3)
    if heads != total:
        y = body("Concat", y, body.slice(x, heads, total, axis), axis=axis)
    return (y,)
