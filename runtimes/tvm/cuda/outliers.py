"""The few large weights beside packed ones (`outlier_packing`) with many rows of activations, and their decoder.

`SumOutliers` writes what they add to every sum of a product, `outliers[m, row] = sum_j x[m, places[j]] values[j]`,
before the product (`gemm`) that adds it in its epilogue. Eight tokens of `CHUNK` inputs lie in shared memory as
halves, the tokens of an input beside each other, so that an entry takes one wide load and eight multiplications; a
thread walks the entries of its packed rows, which are ordered by place, from chunk to chunk. Codes are exact as halves;
floats are rounded to float16 as for the product itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES
from .builder import (
    Frame,
    Tensor,
    at,
    bind,
    call,
    ceil_div,
    div,
    equal,
    get,
    launch,
    local,
    loop,
    mod,
    prim_func,
    put,
    shared,
    sync,
    value,
    when,
    wide,
)
from .epilogue import Linear
from .plan import Call, Plan, Stage
from .weights import Activations

THREADS = 256
TOKENS = 8
CHUNK = 1024
"""Inputs in shared memory at a time: 16 KiB."""
ROWS = 2
"""Packed rows of a thread."""


@dataclass(frozen=True)
class SumOutliers:
    """Outliers and activations of `width` elements a row → `outliers` float32 `[rows, packed]`."""

    linear: Linear
    activations: Activations
    width: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"outliers_{self.activations}_{self.linear.packed}x{self.width}_{self.linear.outliers}"

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        name, dtype = ("u", "uint8") if self.activations == "codes" else ("x", "float32")
        return [Tensor(name, (self.linear.rows, self.width), dtype), *self.linear.entries()]

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        return [Tensor("outliers", (self.linear.rows, self.linear.packed), "float32")]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        packed, rows = self.linear.packed, frame.size(self.linear.rows)
        grid = [-(-packed // (THREADS * ROWS)), ceil_div(rows, TOKENS)]
        with launch(grid, THREADS) as ((block, column), tx):
            memory = shared(CHUNK * TOKENS // 2, "uint32")
            sums, entry, end = local(ROWS * TOKENS), local(ROWS, "int32"), local(ROWS, "int32")
            call("iso_zero_floats", at(sums, 0), ROWS * TOKENS)
            where = [bind((block * ROWS + i) * THREADS + tx) for i in range(ROWS)]
            for i, row in enumerate(where):
                put(entry, i, T.int32(0))
                put(end, i, T.int32(0))
                with when(row < packed):
                    panel = div(row, LANES)
                    put(entry, i, get(frame["offsets"], panel) * LANES + mod(row, LANES))
                    put(end, i, get(frame["offsets"], panel + 1) * LANES)
            with loop(0, -(-self.linear.k // CHUNK)) as chunk:
                sync()
                self._fill(frame, memory, wide(column) * TOKENS, chunk * CHUNK, tx)
                sync()
                for i in range(ROWS):
                    call(
                        "iso_outliers_chunk", at(sums, i * TOKENS), at(entry, i), get(end, i), at(frame["places"], 0),
                        at(frame["values"], 0), at(memory, 0), chunk * CHUNK, (chunk + 1) * CHUNK,
                    )  # fmt: skip
            for token in range(TOKENS):
                line = bind(wide(column) * TOKENS + token)
                for i, row in enumerate(where):
                    with when(T.And(line < rows, row < packed)):
                        total = get(sums, i * TOKENS + token) * T.float32(self.linear.outlier_multiplier)
                        put(frame["outliers"], line * packed + wide(row), total)

    def _fill(self, frame: Frame, memory: Any, first: Any, start: Any, tx: Any) -> None:
        """A chunk of the block's tokens to shared memory; a thread takes an input of two tokens."""
        source = frame["u" if self.activations == "codes" else "x"]
        with loop(0, CHUNK * TOKENS // 2 // THREADS) as turn:
            item = bind(turn * THREADS + tx)
            k, pair = bind(mod(item, CHUNK)), bind(div(item, CHUNK))
            both = local(2)
            for i in range(2):
                put(both, i, T.float32(0))
                line = bind(first + wide(pair * 2 + i))
                with when(T.And(start + k < self.width, line < frame.size(self.linear.rows))):
                    put(both, i, T.cast(get(source, line * self.width + wide(start + k)), "float32"))
            put(memory, k * (TOKENS // 2) + pair, value("uint32", "iso_half2", get(both, 0), get(both, 1)))


def dequantize_outliers(call: Call) -> Plan:
    """`isofold.dequantize_outliers`: a block a row; a thread adds the entries of the columns that it wrote."""
    plan, group_size = Plan(), call.attributes["group_size"]
    n, k_ = (int(s) for s in call["codes"].shape)
    groups, each = int(call["scale"].shape[1]), int(call["places"].shape[1])
    multiplier = float(call.attributes["multiplier"])
    shapes = {"codes": k_, "scale": groups, "zero": groups, "places": each, "values": each}
    there = {name: size for name, size in shapes.items() if call.has(name) and size}
    inputs = [Tensor(plan.view(name, n, size), (n, size), call[name].dtype) for name, size in there.items()]

    def emit(k: Frame) -> None:
        with launch([n], THREADS) as ((row,), tx):
            start = bind(wide(row) * k_)
            with loop(0, -(-k_ // THREADS)) as turn:
                i = bind(turn * THREADS + tx)
                with when(True if k_ % THREADS == 0 else i < k_):
                    group = bind(wide(row) * groups + (wide(div(i, group_size)) if group_size else wide(0)))
                    code = T.cast(get(k["codes"], start + wide(i)), "float32")
                    if "zero" in k:
                        code = code - T.cast(get(k["zero"], group), "float32")
                    put(k["y"], start + wide(i), code * get(k["scale"], group))
            if each:
                add_entries(k, row, start, tx)

    def add_entries(k: Frame, row: Any, start: Any, tx: Any) -> None:
        with loop(0, each) as j:
            entry = bind(wide(row) * each + wide(j))
            place = bind(T.cast(get(k["places"], entry), "int32"))
            with when(equal(mod(place, THREADS) - tx, 0)):
                found = value("float32", "iso_half_at", at(k["values"], entry))
                index = start + wide(place)
                put(k["y"], index, get(k["y"], index) + found * T.float32(multiplier))

    output = Tensor("y", (n, k_), "float32")
    name = f"dequantize_outliers_{n}x{k_}_g{group_size}_{each}"
    plan.stages.append(Stage(prim_func(name, [*inputs, output], emit), tuple(there), (output,)))
    plan.results = ("y",)
    return plan
