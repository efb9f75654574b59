"""Quantizers of long rows, which do not fit shared memory and may have a symbolic length: samples of a batch.

`quantize_dequantize` (per token and per sample), its FP8 form, and for convolutions the pair (s, z) of each sample. A
block goes over its row in global memory twice: the range, then the values.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.quantization import LEAST_SCALE
from ....compiler.dialect.quantization_fp8 import LARGEST
from .builder import (
    Frame,
    Size,
    Tensor,
    bind,
    div,
    equal,
    get,
    launch,
    local,
    mod,
    prim_func,
    put,
    shared,
    sync,
    value,
    when,
    wide,
)
from .plan import Call, Plan, Stage

THREADS = 512


def _loop(k: Frame, length: Size, tx: Any) -> Any:
    """Rounds of the block over a row, as a serial loop's end."""
    return T.serial(wide(0), T.truncdiv(wide(k.size(length)) + (THREADS - 1), wide(THREADS)))


def _largest(cell: Any, tx: Any) -> Any:
    board = shared(THREADS // 32)
    warp = value("float32", "iso_warp_max", get(cell, 0))
    with when(equal(mod(tx, 32), 0)):
        put(board, div(tx, 32), warp)
    sync()
    total = get(board, 0)
    for i in range(1, THREADS // 32):
        total = T.max(total, get(board, i))
    return bind(total)


def _pair(k: Frame, row: Any, length: Size, bits: int, tx: Any) -> tuple[Any, Any]:
    """Scale and zero point of a row of x."""
    low, high = local(1), local(1)
    put(low, 0, T.float32(0))
    put(high, 0, T.float32(0))
    size = wide(k.size(length))
    with _loop(k, length, tx) as turn:
        i = bind(turn * THREADS + wide(tx))
        with when(i < size):
            v = bind(get(k["x"], wide(row) * size + i))
            put(low, 0, T.max(get(low, 0), T.float32(0) - v))
            put(high, 0, T.max(get(high, 0), v))
    below, above = _largest(low, tx), _largest(high, tx)
    levels = T.float32(2**bits - 1)
    s = bind((above + below) / levels)
    s = bind(T.Select(s >= T.float32(LEAST_SCALE), s, T.float32(1)))
    return s, bind(T.min(T.max(value("float32", "rintf", below / s), T.float32(0)), levels))


def code_of(v: Any, inverse: Any, z: Any, bits: int) -> Any:
    """The code of a value, as a float."""
    rounded = value("float32", "rintf", v * inverse) + z
    return T.min(T.max(rounded, T.float32(0)), T.float32(2**bits - 1))


def add_pairs(plan: Plan, rows: Size, length: Size, source: str, bits: int = 8) -> None:
    """Append the kernel that writes `pairs` `[rows, 2]` of `source` `[rows, length]`."""

    def emit(k: Frame) -> None:
        with launch([k.size(rows)], THREADS) as ((row,), tx):
            s, z = _pair(k, row, length, bits, tx)
            with when(equal(tx, 0)):
                put(k["pairs"], wide(row) * 2, s)
                put(k["pairs"], wide(row) * 2 + 1, z)

    output = Tensor("pairs", (rows, 2), "float32")
    function = prim_func(f"pairs_a{bits}", [Tensor("x", (rows, length), "float32"), output], emit)
    plan.stages.append(Stage(function, (source,), (output,)))


def quantize_dequantize(call: Call) -> Plan:
    """`isofold.quantize_dequantize`."""
    plan, bits = Plan(), call.attributes["bits"]
    shape = call["x"].shape
    keep = len(shape) - 1 if call.attributes["granularity"] == "sample" else 1
    rows = plan.rows(call["x"], "m", keep)
    length = plan.size("length", math.prod(shape[len(shape) - keep :]))
    plan.view("x", rows, length)
    static = call.has("params")
    inputs = [Tensor("x", (rows, length), "float32")]
    if static:
        inputs.append(Tensor(plan.view("params", 2), (2,), "float32"))

    def emit(k: Frame) -> None:
        with launch([k.size(rows)], THREADS) as ((row,), tx):
            if static:
                s, z = bind(get(k["params"], 0)), bind(get(k["params"], 1))
            else:
                s, z = _pair(k, row, length, bits, tx)
            inverse = bind(T.float32(1) / s)
            size = wide(k.size(length))
            with _loop(k, length, tx) as turn:
                i = bind(turn * THREADS + wide(tx))
                with when(i < size):
                    at_ = wide(row) * size + i
                    put(k["y"], at_, s * (code_of(get(k["x"], at_), inverse, z, bits) - z))

    output = Tensor("y", (rows, length), "float32")
    name = f"quantize_dequantize_a{bits}{'s' if static else ''}"
    plan.stages.append(
        Stage(prim_func(name, [*inputs, output], emit), tuple(t.name for t in inputs), (output,))
    )
    plan.results = ("y",)
    return plan


def quantize_dequantize_fp8(call: Call) -> Plan:
    """`isofold.quantize_dequantize_fp8`."""
    plan = Plan()
    shape, static = call["x"].shape, call.has("params")
    rows, length = plan.rows(call["x"]), plan.size("length", shape[-1])
    plan.view("x", rows, length)
    inputs = [Tensor("x", (rows, length), "float32")]
    if static:
        inputs.append(Tensor(plan.view("params", 1), (1,), "float32"))

    def scale_of(k: Frame, row: Any, tx: Any) -> Any:
        if static:
            return bind(get(k["params"], 0))
        top, size = local(1), wide(k.size(length))
        put(top, 0, T.float32(0))
        with _loop(k, length, tx) as turn:
            i = bind(turn * THREADS + wide(tx))
            with when(i < size):
                magnitude = value("float32", "iso_magnitude", get(k["x"], wide(row) * size + i))
                put(top, 0, T.max(get(top, 0), magnitude))
        found = bind(_largest(top, tx) / T.float32(LARGEST))
        return bind(T.Select(found < T.float32(LEAST_SCALE), T.float32(1), found))

    def emit(k: Frame) -> None:
        with launch([k.size(rows)], THREADS) as ((row,), tx):
            s = scale_of(k, row, tx)
            inverse = bind(T.float32(1) / s)
            size = wide(k.size(length))
            with _loop(k, length, tx) as turn:
                i = bind(turn * THREADS + wide(tx))
                with when(i < size):
                    at_ = wide(row) * size + i
                    code = value("uint32", "iso_code_e4m3", get(k["x"], at_) * inverse)
                    put(k["y"], at_, s * value("float32", "iso_value_e4m3", code))

    output = Tensor("y", (rows, length), "float32")
    name = f"quantize_dequantize_f8{'s' if static else ''}"
    plan.stages.append(
        Stage(prim_func(name, [*inputs, output], emit), tuple(t.name for t in inputs), (output,))
    )
    plan.results = ("y",)
    return plan
