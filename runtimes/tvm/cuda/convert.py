"""Kernels in front of a product of many rows: activations to halves, and weights that are decoded only once.

`cast_rows` writes float16 activations, padded, in the order of inputs in which weights of a layout decode. `expand`
decodes a layout that the products do not read themselves (2 and 3 bits, tables, small floats, codebooks) to
signed bytes in the layout of int8, or to halves

    H[b, c, r, j] = decoded w[16 b + r, 8 c + j]        uint16 [Np/16, Kp/8, 16, 8]

(j in the layout's order). Decoded values are exact; scales are applied by the product, as for any other layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES
from .builder import (
    Frame,
    Size,
    Tensor,
    at,
    bind,
    call,
    ceil_div,
    div,
    get,
    launch,
    local,
    mod,
    put,
    when,
    wide,
)
from .epilogue import Linear
from .layouts import CodebookLayout, Layout, integer_layout
from .weights import Activations, Weights

THREADS = 256


@dataclass(frozen=True)
class CastRows:
    """x float32 `[rows, k]` → xh halves `[rows, kp]`."""

    rows: Size
    k: int
    kp: int
    order: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"cast_{self.k}_{self.kp}_{self.order:x}"

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        return [Tensor("x", (self.rows, self.k), "float32")]

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        return [Tensor("xh", (self.rows, self.kp), "uint16")]

    def emit(self, frame: Frame) -> None:
        """Write the kernel: a thread makes eight halves."""
        units = self.kp // 8
        with launch([ceil_div(frame.size(self.rows) * units, THREADS)], THREADS) as ((block,), tx):
            item = bind(wide(block) * THREADS + wide(tx))
            row, unit = bind(div(item, units)), bind(mod(item, units))
            with when(row < frame.size(self.rows)):
                four = local(4, "uint32")
                left = T.cast(self.k - unit * 8, "int32")
                source = at(frame["x"], row * self.k + unit * 8)
                call(
                    "iso_halves_floats", at(four, 0), source, left, T.uint32(self.order), int(self.k % 4 == 0)
                )
                call("iso_store16", at(frame["xh"], row * self.kp + unit * 8), at(four, 0))


@dataclass(frozen=True)
class HalvesLayout(Layout):
    """What `Expand` writes: each row's unit as 16 bytes."""

    def halves(self, registers: Any, row: int, unit: Any, out: Any, extra: Any, index: int) -> None:
        for word in range(4):
            put(out, word, get(registers, 4 * row + word))


@dataclass(frozen=True)
class Expand:
    """Weights of one layout → `expanded`, to bytes (for codes) or halves (for floats)."""

    linear: Linear
    weights: Weights
    activations: Activations

    @property
    def kp(self) -> int:
        """Inputs with padding."""
        return self.weights.padded(self.linear.k)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"expand_{self.weights.tag}_{self.activations}_{self.linear.packed}x{self.kp}"

    @property
    def result(self) -> Weights:
        """The weights that this kernel writes."""
        layout = self.weights.layout
        if self.activations == "codes":
            name = f"byte_{layout.name}"
            made: Layout = replace(integer_layout(8), name=name, factor=layout.factor, argument="expanded")
            return replace(self.weights, layout=made)
        made = HalvesLayout(
            f"half_{layout.name}", 16, 256, layout.factor, layout.order, dtype="uint16", argument="expanded"
        )
        return replace(self.weights, layout=made, zero_steps=0)

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        tensors = self.weights.tensors(self.linear, self.kp)
        needs = {"weight", "codebooks", "table"} | ({"zero"} if self.activations == "float" else set())
        needs |= {"scale"} if self.weights.scale == "e4m3" else set()  # which goes into the halves
        return [t for t in tensors if t.name in needs]

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        count = self.linear.packed * self.kp
        return [Tensor("expanded", (count,), "int8" if self.activations == "codes" else "uint16")]

    def emit(self, frame: Frame) -> None:
        """Write the kernel: a thread decodes a unit of four rows."""
        panels, units = self.linear.packed // LANES, self.kp // 8
        count = panels * units * 4
        with launch([-(-count // THREADS)], THREADS) as ((block,), tx):
            item = bind(block * THREADS + tx)
            with when(True if count % THREADS == 0 else item < count):
                quad, rest = bind(mod(item, 4)), bind(div(item, 4))
                unit, panel = bind(mod(rest, units)), bind(div(rest, units))
                registers = local(self.weights.layout.words, "uint32")
                self.weights.layout.read(frame["weight"], panel, self.kp, unit, quad, registers)
                if self.activations == "codes":
                    self._bytes(frame, registers, panel, unit, quad)
                else:
                    self._halves(frame, registers, panel, unit, quad)

    def _bytes(self, frame: Frame, registers: Any, panel: Any, unit: Any, quad: Any) -> None:
        start = wide(panel) * (LANES * self.kp) + wide(unit * 128 + quad * 16)
        low, high = local(4, "uint32"), local(4, "uint32")
        for row in range(4):
            pair = local(2, "uint32")
            self.weights.layout.byte_words(registers, row, unit, pair)
            put(low, row, get(pair, 0))
            put(high, row, get(pair, 1))
        call("iso_store16", at(frame["expanded"], start), at(low, 0))
        call("iso_store16", at(frame["expanded"], start + 64), at(high, 0))

    def _halves(self, frame: Frame, registers: Any, panel: Any, unit: Any, quad: Any) -> None:
        weights, layout = self.weights, self.weights.layout
        extra: Any = frame["codebooks"] if isinstance(layout, CodebookLayout) else None
        if "table" in frame:
            extra = local(8, "uint32")
            call("iso_table_bytes", at(extra, 0), at(frame["table"], 0))
        size = weights.group_size
        index = weights.scale_index(self.kp, panel, div(unit * 8, size) if size else 0, quad)
        if weights.offsets:
            stored = local(1, "uint32")
            if weights.zero:
                call("iso_load4", at(stored, 0), at(frame["zero"], index))
            extra = weights.zeros(get(stored, 0), "float")
        for row in range(4):
            four = local(4, "uint32")
            layout.halves(registers, row, unit, four, extra, 0)
            for more in range(1, layout.passes):
                next_ = local(4, "uint32")
                layout.halves(registers, row, unit, next_, extra, more)
                call("iso_halves_add", at(four, 0), at(next_, 0))
            if weights.scale == "e4m3":
                code = T.cast(get(frame["scale"], index + row), "uint32")
                call("iso_halves_scale", at(four, 0), 1.0 / layout.factor, code)
            start = wide(panel) * (LANES * self.kp) + wide((unit * LANES + quad * 4 + row) * 8)
            call("iso_store16", at(frame["expanded"], start), at(four, 0))
