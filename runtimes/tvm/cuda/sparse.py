"""Linears on sparse weights: a warp computes an output from the values that are stored, whatever the layout.

Lanes share the values of a row (`sparse_encodings`), eight tokens share what a warp decodes. With many rows, weights
are written out densely once and multiplied as such (`Densify`); floats then become float16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES, alignment, ceil_to
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
from .sparse_encodings import Encoding
from .weights import Weights

WARPS = 8
TOKENS = 8


@dataclass(frozen=True)
class SparseRows:
    """The kernel for few rows; activations of codes have `width` a row.

    group_size: of scales of groups, all times `multiplier`; 0: a scale a row.
    """

    linear: Linear
    encoding: Encoding
    width: int
    static_params: bool = False
    group_size: int = 0
    multiplier: float = 1.0

    @property
    def codes(self) -> bool:
        """Whether weights and activations are codes."""
        return self.encoding.codes

    @property
    def name(self) -> str:
        """The kernel's name."""
        kind = ("a8s" if self.static_params else "a8") if self.codes else "float"
        groups = f"g{self.group_size}" if self.group_size else ""
        return f"sparse_{self.encoding.tag}{groups}_{kind}_{self.linear.tag}_{self.width}"

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return ceil_to(self.linear.k, alignment(self.group_size)) // self.group_size if self.group_size else 1

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        linear, rows, encoding = self.linear, self.linear.rows, self.encoding.tensors()
        if not self.codes:
            return [Tensor("x", (rows, linear.k), "float32"), *encoding, *linear.tensors()]
        pair = (2,) if self.static_params else (rows, 2)
        scale = "float16" if self.group_size else "float32"
        return [
            Tensor("u", (rows, self.width), "uint8"), Tensor("params", pair, "float32"), *encoding,
            Tensor("scale", (linear.packed * self.groups,), scale), Tensor("wsum", (linear.packed,), "float32"),
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

    @property
    def _integers(self) -> bool:
        """Whether sums are int32: scales of groups go into the weights."""
        return self.codes and not self.group_size

    def _total(self, sums: Any, token: int) -> Any:
        return T.cast(get(sums, token), "float32") if self._integers else get(sums, token)

    def _row(self, frame: Frame, row: Any, column: Any, lane: Any) -> Any:
        """A lane's sums over its values of a packed row, for all tokens of the block."""
        linear, row = self.linear, bind(row)
        kind = "int32" if self._integers else "float32"
        sums = local(TOKENS, kind)
        for token in range(TOKENS):
            put(sums, token, tirx.const(0, kind))

        def add(k: Any, weight: Any) -> None:
            if self.group_size:
                group = div(row, LANES) * self.groups + div(k, self.group_size)
                scale = value("float32", "iso_half_at", at(frame["scale"], group * LANES + mod(row, LANES)))
                weight = bind(T.cast(weight, "float32") * scale)
            for token in range(TOKENS):
                where = bind(wide(column * TOKENS + token))
                with when(where < frame.size(linear.rows)):
                    if self.codes:
                        x = T.cast(get(frame["u"], where * self.width + wide(k)), kind)
                    else:
                        x = get(frame["x"], where * linear.k + wide(k))
                    put(sums, token, get(sums, token) + weight * x)

        self.encoding.each(frame, row, lane, add)
        return sums

    def _scaled(self, frame: Frame, total: Any, row: Any, where: Any) -> Any:
        if not self.codes:
            return total
        pair: Any = 0 if self.static_params else wide(where) * 2
        s, z = get(frame["params"], pair), get(frame["params"], pair + 1)
        scale = T.float32(self.multiplier) if self.group_size else get(frame["scale"], row)
        return bind(s * (total * scale - z * get(frame["wsum"], row)))


@dataclass(frozen=True)
class Densify:
    """Sparse weights → `expanded`: the dense int8 layout, or halves (`convert.HalvesLayout`)."""

    linear: Linear
    encoding: Encoding
    group_size: int = 0

    @property
    def kp(self) -> int:
        """Inputs with padding."""
        return ceil_to(self.linear.k, alignment(self.group_size))

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"densify_{self.encoding.tag}_{self.linear.packed}x{self.linear.k}_{self.kp}"

    @property
    def result(self) -> Weights:
        """The weights that this kernel writes."""
        if self.encoding.codes:
            layout = replace(integer_layout(8), name="byte_sparse", argument="expanded")
            return Weights(layout, self.group_size, "float16" if self.group_size else "float32")
        return Weights(
            HalvesLayout("half_sparse", 16, 256, 1.0, dtype="uint16", argument="expanded"), 0, "float32"
        )

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        return self.encoding.tensors()

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        count = self.linear.packed * self.kp
        return [Tensor("expanded", (count,), "int8" if self.encoding.codes else "uint16")]

    def emit(self, frame: Frame) -> None:
        """Write the kernel: a warp writes zeros to a row, then the values."""
        packed, codes, width = self.linear.packed, self.encoding.codes, 4 if self.encoding.codes else 8
        pieces = self.kp // width
        with launch([packed // WARPS], 32 * WARPS) as ((block,), tx):
            lane, row = bind(mod(tx, 32)), bind(block * WARPS + div(tx, 32))
            panel, r = bind(div(row, LANES)), bind(mod(row, LANES))
            start = bind(wide(panel) * (LANES * self.kp))
            zeros = local(4, "uint32")
            call("iso_zero", at(zeros, 0), 4)
            with loop(0, -(-pieces // 32)) as turn:
                piece = bind(turn * 32 + lane)
                with when(True if pieces % 32 == 0 else piece < pieces):
                    to = at(frame["expanded"], start + wide((piece * LANES + r) * width))
                    if codes:
                        call("iso_store4", to, get(zeros, 0))
                    else:
                        call("iso_store16", to, at(zeros, 0))
            call("iso_sync_warp")

            def write(k: Any, weight: Any) -> None:
                index = start + wide((div(k, width) * LANES + r) * width + mod(k, width))
                if codes:
                    put(frame["expanded"], index, T.cast(weight, "int8"))
                else:
                    half = value("uint32", "iso_half2", weight, 0.0)
                    put(frame["expanded"], index, T.cast(half & T.uint32(0xFFFF), "uint16"))

            self.encoding.each(frame, row, lane, write)
