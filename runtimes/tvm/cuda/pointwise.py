"""Operators that compute each element of the result by itself: gated, rotary, embeddings and the dequantizers.

A thread makes one element; neighbours in a warp make neighbours in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.cache_packing import pair_count, row_bytes
from ....compiler.dialect.element_formats import element_format
from .builder import (
    Frame,
    Size,
    Tensor,
    bind,
    ceil_div,
    get,
    launch,
    local,
    prim_func,
    put,
    value,
    when,
    wide,
)
from .epilogue import activated
from .plan import Call, Plan, Stage

THREADS = 256


def add_pointwise(
    plan: Plan, name: str, inputs: Sequence[Tensor], output: Tensor, body: Callable[[Frame, Any], Any]
) -> None:
    """Append a kernel that writes `body(frame, i)` to every element i (int64) of a flat output."""

    def emit(k: Frame) -> None:
        count: Any = wide(1)
        for size in output.shape:
            count = count * k.size(size)
        with launch([ceil_div(count, THREADS)], THREADS) as ((block,), tx):
            i = bind(wide(block) * THREADS + wide(tx))
            with when(i < count):
                put(k[output.name], i, body(k, i))

    function = prim_func(name, [*inputs, output], emit)
    plan.stages.append(Stage(function, tuple(t.name for t in inputs), (output,)))


def _over(a: Any, b: Any) -> Any:
    """a / b for a >= 0, both int64 or ints."""
    return T.truncdiv(wide(a), wide(b))


def _rest(a: Any, b: Any) -> Any:
    return T.truncmod(wide(a), wide(b))


def gated(call: Call) -> Plan:
    """`isofold.gated`."""
    plan = Plan()
    count = plan.rows(call["gate"], keep=0)
    inputs = [Tensor(plan.view(name, count), (count,), "float32") for name in ("gate", "up")]
    activation = call.attributes["activation"]

    def body(k: Frame, i: Any) -> Any:
        return activated(get(k["gate"], i), activation) * get(k["up"], i)

    add_pointwise(plan, f"gated_{activation}", inputs, Tensor("y", (count,), "float32"), body)
    plan.results = ("y",)
    return plan


def rotary(call: Call) -> Plan:
    """`isofold.rotary`."""
    plan, attributes = Plan(), call.attributes
    x, cos = call["x"], call["cos"]
    axis, interleaved = attributes["head_dim_index"], attributes["interleaved"]
    sizes: list[Size] = [plan.size(f"x{n}", s) for n, s in enumerate(x.shape)]
    depth, width = int(x.shape[3]), int(cos.shape[3])
    table = tuple(1 if _is_one(s) else sizes[n] for n, s in enumerate(cos.shape[:3]))
    plan.view("x", *sizes)
    for name in ("cos", "sin"):
        plan.view(name, *table, width)
    heads = attributes["heads"]

    def body(k: Frame, i: Any) -> Any:
        d, rest = bind(_rest(i, depth)), bind(_over(i, depth))
        places: list[Any] = [None, None, None]
        for n in (2, 1):
            places[n] = bind(_rest(rest, k.size(sizes[n])))
            rest = bind(_over(rest, k.size(sizes[n])))
        places[0] = rest
        result = local(1)
        put(result, 0, get(k["x"], i))
        turned = d < width if heads < 0 else T.And(d < width, places[axis] < heads)
        with when(turned):
            row: Any = wide(0)
            for n in range(3):
                row = row * k.size(table[n]) + (wide(0) if table[n] == 1 else places[n])
            angle = bind(row * width + d)
            half = width // 2
            if interleaved:
                first = _rest(d, 2) < 1
                partner = T.Select(first, i + 1, i - 1)
            else:
                first = d < half
                partner = T.Select(first, i + half, i - half)
            other = bind(get(k["x"], partner))
            signed = T.Select(first, T.float32(0) - other, other)
            put(result, 0, get(k["x"], i) * get(k["cos"], angle) + signed * get(k["sin"], angle))
        return get(result, 0)

    inputs = [Tensor("x", tuple(sizes), "float32")]
    inputs += [Tensor(name, (*table, width), "float32") for name in ("cos", "sin")]
    kind = "interleaved" if interleaved else "half"
    shape = "_".join("n" if isinstance(s, str) else "1" if s == 1 else "f" for s in table)
    name = f"rotary_{axis}_{depth}_{width}_{heads if heads >= 0 else 'all'}_{kind}_{shape}"
    add_pointwise(plan, name, inputs, Tensor("y", tuple(sizes), "float32"), body)
    plan.results = ("y",)
    return plan


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def embedding_packed(call: Call) -> Plan:
    """`isofold.embedding_packed`; an id outside of the table gives a row of NaN."""
    plan, attributes = Plan(), call.attributes
    dim, bits, group_size = attributes["dim"], attributes["bits"], attributes["group_size"]
    table = call["weight"]
    rows_of_table, width = int(table.shape[0]), int(table.shape[1])
    groups = int(call["scale"].shape[1])
    rows = plan.rows(call["ids"], keep=0)
    inputs = [Tensor(plan.view("ids", rows), (rows,), call["ids"].dtype)]
    inputs.append(Tensor(plan.view("weight", rows_of_table, width), (rows_of_table, width), table.dtype))
    inputs.append(Tensor(plan.view("scale", rows_of_table, groups), (rows_of_table, groups), "float32"))
    if call.has("zero"):
        inputs.append(Tensor(plan.view("zero", rows_of_table, groups), (rows_of_table, groups), "int8"))

    def body(k: Frame, i: Any) -> Any:
        row, d = bind(_over(i, dim)), bind(_rest(i, dim))
        given = bind(wide(get(k["ids"], row)))
        place = bind(T.Select(given < 0, given + rows_of_table, given))
        result = local(1)
        put(result, 0, value("float32", "__int_as_float", 0x7FC00000))
        with when(T.And(place >= 0, place < rows_of_table)):
            if bits == 8:
                code = T.cast(get(k["weight"], place * width + d), "int32")
            else:
                byte = T.cast(get(k["weight"], place * width + _over(d, 2)), "int32")
                nibble = (byte >> T.cast(_rest(d, 2) * 4, "int32")) & T.int32(15)
                code = T.bitwise_xor(nibble, T.int32(8)) - 8
            group = place * groups + (_over(d, group_size) if group_size else wide(0))
            if "zero" in k:
                code = code - T.cast(get(k["zero"], group), "int32")
            put(result, 0, T.cast(code, "float32") * get(k["scale"], group))
        return get(result, 0)

    name = f"embedding_int{bits}g{group_size}{'z' if call.has('zero') else ''}_{rows_of_table}x{dim}"
    add_pointwise(plan, name, inputs, Tensor("y", (rows, dim), "float32"), body)
    plan.results = ("y",)
    return plan


def dequantize_weight(call: Call) -> Plan:
    """`isofold.dequantize_weight`."""
    plan, group_size = Plan(), call.attributes["group_size"]
    n, k_ = _matrix(call["codes"].shape)
    groups = int(call["scale"].shape[-1])
    if len(call["scale"].shape) == 3:  # a matrix for each expert, one above the other
        n, k_ = n * int(call["codes"].shape[1]), int(call["codes"].shape[2])
    inputs = [Tensor(plan.view("codes", n, k_), (n, k_), "int8")]
    inputs.append(Tensor(plan.view("scale", n, groups), (n, groups), "float32"))
    if call.has("zero"):
        inputs.append(Tensor(plan.view("zero", n, groups), (n, groups), call["zero"].dtype))

    def body(k: Frame, i: Any) -> Any:
        group = bind(_over(i, k_) * groups + (_over(_rest(i, k_), group_size) if group_size else wide(0)))
        code = T.cast(get(k["codes"], i), "float32")
        if "zero" in k:
            code = code - T.cast(get(k["zero"], group), "float32")
        return code * get(k["scale"], group)

    kind = call["zero"].dtype if call.has("zero") else "symmetric"
    name = f"dequantize_weight_{n}x{k_}_g{group_size}_{kind}"
    add_pointwise(plan, name, inputs, Tensor("y", (n, k_), "float32"), body)
    plan.results = ("y",)
    return plan


def _matrix(shape: Sequence[Any]) -> tuple[int, int]:
    sizes = [int(s) for s in shape]
    return sizes[0], math.prod(sizes[1:])


def dequantize_coded(call: Call) -> Plan:
    """`isofold.dequantize_coded`."""
    plan, group_size = Plan(), call.attributes["group_size"]
    form = element_format(call.attributes["format"])
    n, k_ = _matrix(call["codes"].shape)
    groups = int(call["scale"].shape[1])
    if call.has("table"):
        plan.view("table", 16)
    else:
        plan.constants["table"] = form.values().numpy().astype(np.float32)
    inputs = [
        Tensor(plan.view("codes", n, k_), (n, k_), "uint8"),
        Tensor(plan.view("scale", n, groups), (n, groups), call["scale"].dtype),
        Tensor(plan.view("multiplier", 1), (1,), "float32"),
        Tensor("table", (16 if call.has("table") else 2**form.bits,), "float32"),
    ]

    def body(k: Frame, i: Any) -> Any:
        group = bind(_over(i, k_) * groups + (_over(_rest(i, k_), group_size) if group_size else wide(0)))
        scale = get(k["scale"], group)
        if form.scale != "float":
            scale = value("float32", f"iso_{form.scale}", T.cast(scale, "uint32"))
        return get(k["table"], T.cast(get(k["codes"], i), "int32")) * (scale * get(k["multiplier"], 0))

    name = f"dequantize_{form.name}_{n}x{k_}_g{group_size}"
    add_pointwise(plan, name, inputs, Tensor("y", (n, k_), "float32"), body)
    plan.results = ("y",)
    return plan


def dequantize_codebook(call: Call) -> Plan:
    """`isofold.dequantize_codebook`."""
    plan, k_ = Plan(), call.attributes["k"]
    n, groups, count = (int(s) for s in call["codes"].shape)
    size = int(call["codebooks"].shape[1])
    inputs = [
        Tensor(plan.view("codes", n * groups * count), (n * groups * count,), call["codes"].dtype),
        Tensor(plan.view("codebooks", count * size * 8), (count * size * 8,), "float32"),
        Tensor(plan.view("scale", n), (n,), "float32"),
    ]

    def body(k: Frame, i: Any) -> Any:
        row, column = bind(_over(i, k_)), bind(_rest(i, k_))
        first = bind((row * groups + _over(column, 8)) * count)
        total = None
        for m in range(count):
            code = wide(T.cast(get(k["codes"], first + m), "int32"))
            entry = get(k["codebooks"], (code + m * size) * 8 + _rest(column, 8))
            total = entry if total is None else total + entry
        return total * get(k["scale"], row)

    name = f"dequantize_codebook_{n}x{k_}_{count}x{size}"
    add_pointwise(plan, name, inputs, Tensor("y", (n, k_), "float32"), body)
    plan.results = ("y",)
    return plan


def dequantize_cache(call: Call) -> Plan:
    """`isofold.dequantize_cache`: a row of the kernel is a group of a head."""
    plan, a = Plan(), call.attributes
    bits, groups = a["bits"], pair_count(a["depth"], a["group"])
    depth = a["depth"] // groups
    rows, width = plan.rows(call["codes"], parts=groups), row_bytes(depth, bits)
    inputs = [
        Tensor(plan.view("codes", rows, width), (rows, width), "uint8"),
        Tensor(plan.view("params", rows, 2), (rows, 2), "float32"),
    ]

    def body(k: Frame, i: Any) -> Any:
        row, d = bind(_over(i, depth)), bind(_rest(i, depth))
        if bits == 8:
            code = T.cast(get(k["codes"], row * width + d), "int32")
        else:
            byte = T.cast(get(k["codes"], row * width + _over(d, 32) * 16 + _rest(d, 16)), "int32")
            code = (byte >> T.cast(_rest(_over(d, 16), 2) * 4, "int32")) & T.int32(15)
        return get(k["params"], row * 2) * (T.cast(code, "float32") - get(k["params"], row * 2 + 1))

    add_pointwise(
        plan, f"dequantize_cache_a{bits}_{depth}", inputs, Tensor("y", (rows, depth), "float32"), body
    )
    plan.results = ("y",)
    return plan
