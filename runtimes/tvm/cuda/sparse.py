"""Linears on sparse weights in the bitmask layout (places, values and offsets of rows).

A warp computes an output: lanes are the columns of a 32-bit word of the mask, and a lane's value is at the number of
ones below it, so that values are read in order and without gaps. Eight tokens share what a warp decodes. With many
rows, weights are written out densely once and multiplied as such (`Densify`); floats then become float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES, ceil_to
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
    put,
    value,
    when,
    wide,
)
from .convert import HalvesLayout
from .epilogue import Linear
from .layouts import integer_layout
from .weights import Weights

WARPS = 8
TOKENS = 8


@dataclass(frozen=True)
class SparseRows:
    """The kernel for few rows. codes: int8 weights and activations of `width` unsigned codes a row; else float32."""

    linear: Linear
    codes: bool
    width: int
    count: int
    """Stored values."""
    static_params: bool = False

    @property
    def name(self) -> str:
        """The kernel's name."""
        kind = ("a8s" if self.static_params else "a8") if self.codes else "float"
        return f"sparse_{kind}_{self.linear.tag}_{self.width}"

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        linear, rows = self.linear, self.linear.rows
        words = 2 * ceil_to(linear.k, 64) // 64
        encoding = [
            Tensor("places", (linear.packed, 4 * words), "uint8"),
            Tensor("values", (self.count,), "int8" if self.codes else "float32"),
            Tensor("offsets", (linear.packed + 1,), "int32"),
        ]
        if not self.codes:
            return [Tensor("x", (rows, linear.k), "float32"), *encoding, *linear.tensors()]
        pair = (2,) if self.static_params else (rows, 2)
        return [
            Tensor("u", (rows, self.width), "uint8"), Tensor("params", pair, "float32"), *encoding,
            Tensor("scale", (linear.packed,), "float32"), Tensor("wsum", (linear.packed,), "float32"),
            *linear.tensors(),
        ]  # fmt: skip

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        linear = self.linear
        grid = [-(-linear.n // WARPS), ceil_div(frame.size(linear.rows), TOKENS)]
        with launch(grid, 32 * WARPS) as ((block, column), tx):
            lane = bind(mod(tx, 32))
            feature = bind(block * WARPS + div(tx, 32))
            with when(True if linear.n % WARPS == 0 else feature < linear.n):
                row = bind(linear.packed_row(feature))
                sums = [
                    self._row(frame, r, column, lane)
                    for r in ((row, row + LANES) if linear.gated else (row,))
                ]
                for token in range(TOKENS):
                    where = bind(column * TOKENS + token)
                    totals = [value("float32", "iso_warp_sum", self._total(s, token)) for s in sums]
                    inside = T.And(equal(lane, token), wide(where) < frame.size(linear.rows))
                    with when(inside):
                        found = [self._scaled(frame, t, row + i * LANES, where) for i, t in enumerate(totals)]
                        linear.finish(frame, where, feature, found[0], found[1] if linear.gated else None)

    def _total(self, sums: Any, token: int) -> Any:
        return T.cast(get(sums, token), "float32") if self.codes else get(sums, token)

    def _row(self, frame: Frame, row: Any, column: Any, lane: Any) -> Any:
        """A lane's sums over its columns of a packed row, for all tokens of the block."""
        linear = self.linear
        words = 2 * ceil_to(linear.k, 64) // 64
        kind = "int32" if self.codes else "float32"
        sums, place = local(TOKENS, kind), local(1, "int32")
        for token in range(TOKENS):
            put(sums, token, tirx.const(0, kind))
        put(place, 0, get(frame["offsets"], row))
        with loop(0, words) as word:
            bits = local(1, "uint32")
            call("iso_load4", at(bits, 0), at(frame["places"], wide(row) * (4 * words) + wide(word * 4)))
            there = T.cast((get(bits, 0) >> T.cast(lane, "uint32")) & T.uint32(1), "int32")
            with when(there > 0):
                weight = get(frame["values"], get(place, 0) + value("int32", "iso_rank", get(bits, 0), lane))
                weight = bind(T.cast(weight, "int32") if self.codes else weight)
                k = bind(word * 32 + lane)
                for token in range(TOKENS):
                    where = bind(wide(column * TOKENS + token))
                    with when(where < frame.size(linear.rows)):
                        x = get(frame["u"], where * self.width + wide(k)) if self.codes else None
                        x = T.cast(x, "int32") if self.codes else get(frame["x"], where * linear.k + wide(k))
                        put(sums, token, get(sums, token) + weight * x)
            put(place, 0, get(place, 0) + value("int32", "iso_ones", get(bits, 0)))
        return sums

    def _scaled(self, frame: Frame, total: Any, row: Any, where: Any) -> Any:
        if not self.codes:
            return total
        pair: Any = 0 if self.static_params else wide(where) * 2
        s, z = get(frame["params"], pair), get(frame["params"], pair + 1)
        return bind(s * (total * get(frame["scale"], row) - z * get(frame["wsum"], row)))


@dataclass(frozen=True)
class Densify:
    """Sparse weights → `expanded`: the dense int8 layout, or halves (`convert.HalvesLayout`)."""

    linear: Linear
    codes: bool
    count: int

    @property
    def kp(self) -> int:
        """Inputs with padding."""
        return ceil_to(self.linear.k, 32)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"densify_{'int8' if self.codes else 'half'}_{self.linear.packed}x{self.linear.k}"

    @property
    def result(self) -> Weights:
        """The weights that this kernel writes."""
        if self.codes:
            return Weights(replace(integer_layout(8), name="byte_sparse", argument="expanded"), 0, "float32")
        return Weights(
            HalvesLayout("half_sparse", 16, 256, 1.0, dtype="uint16", argument="expanded"), 0, "float32"
        )

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        return [t for t in SparseRows(self.linear, self.codes, 0, self.count).tensors() if t.name in ENCODING]

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        return [Tensor("expanded", (self.linear.packed * self.kp,), "int8" if self.codes else "uint16")]

    def emit(self, frame: Frame) -> None:
        """Write the kernel: a warp writes out a row."""
        packed, words = self.linear.packed, 2 * ceil_to(self.linear.k, 64) // 64
        with launch([-(-packed // WARPS)], 32 * WARPS) as ((block,), tx):
            lane, row = bind(mod(tx, 32)), bind(block * WARPS + div(tx, 32))
            panel, r = bind(div(row, LANES)), bind(mod(row, LANES))
            place = local(1, "int32")
            put(place, 0, get(frame["offsets"], row))
            with loop(0, self.kp // 32) as word:
                bits = local(1, "uint32")
                call("iso_load4", at(bits, 0), at(frame["places"], wide(row) * (4 * words) + wide(word * 4)))
                there = T.cast((get(bits, 0) >> T.cast(lane, "uint32")) & T.uint32(1), "int32")
                kind = "int8" if self.codes else "float32"
                found = local(1, kind)
                put(found, 0, tirx.const(0, kind))
                with when(there > 0):
                    rank = value("int32", "iso_rank", get(bits, 0), lane)
                    put(found, 0, get(frame["values"], get(place, 0) + rank))
                k = bind(word * 32 + lane)
                start = wide(panel) * (LANES * self.kp)
                if self.codes:
                    index = start + wide((div(k, 4) * LANES + r) * 4 + mod(k, 4))
                    put(frame["expanded"], index, get(found, 0))
                else:
                    index = start + wide((div(k, 8) * LANES + r) * 8 + mod(k, 8))
                    half = value("uint32", "iso_half2", get(found, 0), 0.0)
                    put(frame["expanded"], index, T.cast(half & T.uint32(0xFFFF), "uint16"))
                put(place, 0, get(place, 0) + value("int32", "iso_ones", get(bits, 0)))


ENCODING = ("places", "values", "offsets")
