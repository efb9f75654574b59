"""Products of packed weights with many rows of activations: tiles in shared memory, several stages of copies, tensor
cores.

A block computes `features` x `tokens` outputs. Weights (16-byte pieces of panels, as they are packed) and activations
(64 bytes of a token: 64 codes, or 32 halves) come by asynchronous copies into a ring of stages, one barrier a
stage. Weights are the 16-row operand: a lane's four rows of a panel and unit are one 16-byte piece (int4; two for
int8, four for halves, four half ones for FP8), which decodes in registers to its operands. Pieces are stored at places
permuted within a line of 128 bytes so that the eight lanes that a shared-memory access serves at once hit 32 different
banks.

    weights   the lanes (g = 0, 1; t = 0..3) of an access differ in piece g and unit t
    tokens    the lanes (g = 0..3; t = 0..3) differ in token g and 8 bytes at 8 t

Sums are int32 or float32 in registers; a group's are scaled into a float32 copy. A lane ends with four consecutive
outputs of each of its tokens, eight lanes with 32, so results go straight from registers to memory. What outliers
beside the weights add was summed before (`outliers.SumOutliers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
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
    put,
    shared_dynamic,
    sync,
    value,
    when,
    wide,
)
from .epilogue import Linear
from .weights import Activations, Weights

STAGES = 4
"""Of the ring, unless tuned."""
TOKEN_BYTES = 64
"""Bytes of a token in a stage."""


@dataclass(frozen=True)
class Tile:
    """How a block's outputs are split: warps along features and tokens, and each warp's 32-row and 8-token pieces."""

    warps_n: int
    warps_m: int
    rows: int
    columns: int

    @property
    def features(self) -> int:
        """Packed rows of a block."""
        return 32 * self.warps_n * self.rows

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 8 * self.warps_m * self.columns

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_m


LARGE = Tile(2, 2, 2, 8)
"""128 x 128 with 64 x 64 a warp: few shared-memory reads a product; for sums without groups."""
GROUPED = Tile(4, 2, 1, 8)
"""128 x 128 with 32 x 64 a warp: a second set of sums fits the registers."""
SMALL = Tile(2, 2, 1, 4)
"""64 x 64: for products that are too small to fill the GPU with larger tiles."""


@dataclass(frozen=True)
class Gemm:
    """One kernel. Weights are int8, int4, FP8, or halves that an expanding kernel wrote; floats are halves in `xh`."""

    linear: Linear
    weights: Weights
    activations: Activations
    tile: Tile
    static_params: bool = False
    stages: int = STAGES

    @property
    def kp(self) -> int:
        """Inputs with padding."""
        return self.weights.padded(self.linear.k)

    @property
    def name(self) -> str:
        """The kernel's name."""
        kind = {"codes": "a8", "fp8": "f8", "float": "a16"}[self.activations]
        kind += "s" if self.static_params else ""
        return f"gemm_{self.weights.tag}_{kind}_{self.linear.tag}_{self.tile.features}x{self.tile.tokens}"

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        rows = self.linear.rows
        if self.activations != "float":
            width = 2 if self.activations == "codes" else 1
            pair = (width,) if self.static_params else (rows, width)
            first = [Tensor("u", (rows, self.kp), "uint8"), Tensor("params", pair, "float32")]
            last = [Tensor("wsum", (self.linear.packed,), "float32")] if width == 2 else []
        else:
            first, last = [Tensor("xh", (rows, self.kp), "uint16")], []
        if self.linear.outliers:
            last.append(Tensor("outliers", (rows, self.linear.packed), "float32"))
        return [*first, *self.weights.tensors(self.linear, self.kp), *last, *self.linear.tensors()]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        tile, rows = self.tile, frame.size(self.linear.rows)
        grid = [ceil_div(self.linear.packed, tile.features), ceil_div(rows, tile.tokens)]
        with launch(grid, tile.threads) as ((block_n, block_m), tx):
            _Body(self, frame, block_n, block_m, tx).emit()


class _Body:
    """The kernel while it is written."""

    def __init__(self, spec: Gemm, frame: Frame, block_n: Any, block_m: Any, tx: Any) -> None:
        self.spec, self.frame, self.tile, self.weights = spec, frame, spec.tile, spec.weights
        self.layout, self.codes, self.fp8 = (
            spec.weights.layout,
            spec.activations != "float",
            spec.activations == "fp8",
        )
        self.block_n, self.block_m, self.tx = block_n, block_m, tx
        warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
        self.g, self.t = bind(div(lane, 4)), bind(mod(lane, 4))
        self.quad, self.half = bind(mod(self.g, 4)), bind(div(self.g, 4))
        self.warp_n, self.warp_m = bind(mod(warp, self.tile.warps_n)), bind(div(warp, self.tile.warps_n))
        self.steps = 2 if self.codes else 1  # of 32 inputs in a stage
        self.units = 4 * self.steps
        self.pieces = 4 * self.layout.words // 16  # 16-byte pieces of a lane's unit
        self.panel_bytes = self.units * 64 * self.pieces  # of a panel in a stage
        self.weight_bytes = self.tile.features // LANES * self.panel_bytes
        self.stage_bytes = self.weight_bytes + self.tile.tokens * TOKEN_BYTES
        self.ring = spec.stages
        self.memory = shared_dynamic(self.ring * self.stage_bytes)
        count = self.tile.rows * self.tile.columns * 8
        self.direct = not self.weights.grouped
        self.kind = "int32" if spec.activations == "codes" else "float32"
        self.sums = local(count, self.kind)
        self.scaled = self.sums if self.direct else local(count)
        self.totals = local(self.tile.columns * 4, "int32") if self.codes and self.weights.zero else None
        self._clear(self.sums, self.kind)
        if not self.direct:
            self._clear(self.scaled, "float32")
        if self.totals is not None:
            self._clear(self.totals, "int32")

    def _clear(self, sums: Any, kind: str) -> None:
        for i in range(int(sums.shape[0])):
            put(sums, i, tirx.const(0, kind))

    def emit(self) -> None:
        stages = -(-self.spec.kp // (32 * self.steps))
        for ahead in range(self.ring - 1):
            self._copy(ahead, stages)
        with loop(0, stages) as stage:
            call("iso_copy_wait", self.ring - 2)
            sync()
            self._copy(stage + (self.ring - 1), stages)
            slot = bind(mod(stage, self.ring) * self.stage_bytes)
            for step in range(self.steps):
                self._step(stage * self.steps + step, step, slot)
        self._finish()

    # -- copies

    def _place(self, unit: Any, piece: Any) -> Any:
        """Byte of a 16-byte piece in a panel of a stage: permuted within its line (module)."""
        if self.pieces == 1:  # piece = quad; two units a line
            return unit * 64 + T.bitwise_xor(piece, mod(div(unit, 2), 2) * 2) * 16
        if self.pieces == 2:  # piece = 4 j + quad
            return unit * 128 + T.bitwise_xor(piece, mod(unit, 4) * 2) * 16
        return unit * 256 + T.bitwise_xor(piece, mod(unit, 4)) * 16  # piece = row

    def _copy(self, stage: Any, stages: int) -> None:
        """Start the copies of a stage; an empty group of copies where there is none."""
        slot = bind(mod(stage, self.ring) * self.stage_bytes)
        with when(stage < stages):
            self._copy_weights(stage, slot)
            self._copy_tokens(stage, slot + self.weight_bytes)
        call("iso_copy_commit")

    def _copy_weights(self, stage: Any, slot: Any) -> None:
        per_unit = 4 * self.pieces
        panels = self.spec.linear.packed // LANES
        row_bytes = self.layout.panel_bytes * self.spec.kp // 8
        count = self.weight_bytes // 16
        weight = self.frame[self.layout.argument]
        size = 2 if str(weight.dtype) == "uint16" else 1
        with loop(0, -(-count // self.tile.threads)) as turn:
            item = bind(turn * self.tile.threads + self.tx)
            with when(True if count % self.tile.threads == 0 else item < count):
                local_panel = bind(div(item, per_unit * self.units))
                unit = bind(mod(div(item, per_unit), self.units))
                piece = bind(mod(item, per_unit))
                panel = bind(self.block_n * (self.tile.features // LANES) + local_panel)
                whole = bind(stage * self.units + unit)
                there = T.And(panel < panels, whole < self.spec.kp // 8)
                source = wide(panel) * row_bytes + wide(whole * (64 * self.pieces) + piece * 16)
                index = T.Select(there, T.truncdiv(source, T.int64(size)), T.int64(0))
                to = slot + local_panel * self.panel_bytes + self._place(unit, piece)
                call(
                    "iso_copy16",
                    at(self.memory, to),
                    at(weight, index),
                    T.Select(there, T.int32(16), T.int32(0)),
                )

    def _copy_tokens(self, stage: Any, slot: Any) -> None:
        count = self.tile.tokens * (TOKEN_BYTES // 16)
        source, each = (self.frame["u"], 16) if self.codes else (self.frame["xh"], 8)
        kp = self.spec.kp
        with loop(0, -(-count // self.tile.threads)) as turn:
            item = bind(turn * self.tile.threads + self.tx)
            with when(True if count % self.tile.threads == 0 else item < count):
                token, piece = bind(div(item, 4)), bind(mod(item, 4))
                where = bind(wide(self.block_m * self.tile.tokens + token))
                k = bind((stage * 4 + piece) * each)
                there = T.And(where < self.frame.size(self.spec.linear.rows), k < kp)
                index = T.Select(there, where * kp + wide(k), T.int64(0))
                place = token * TOKEN_BYTES + self._token_piece(token, piece) * 16
                call(
                    "iso_copy16",
                    at(self.memory, slot + place),
                    at(source, index),
                    T.Select(there, T.int32(16), T.int32(0)),
                )

    def _token_piece(self, token: Any, piece: Any) -> Any:
        return T.bitwise_xor(piece, mod(div(token, 2), 2) * 2) if self.codes else piece

    # -- products

    def _step(self, index: Any, step: int, slot: Any) -> None:
        """32 inputs: the operands of weights, then each column of tokens."""
        unit = bind(step * 4 + self.t)
        whole = bind(index * 4 + self.t)
        count = 8 if self.codes else 16
        a = local(self.tile.rows * count, "uint32")
        for row in range(self.tile.rows):
            self._weights(row, unit, whole, index, slot, a, row * count)
        ones = local(4, "uint32")
        if self.totals is not None:
            for i in range(4):
                put(ones, i, T.uint32(0x01010101))
        for column in range(self.tile.columns):
            token = bind((self.warp_m * self.tile.columns + column) * 8 + self.g)
            b = local(4, "uint32")
            base = slot + self.weight_bytes + token * TOKEN_BYTES
            if self.codes:
                place = self._token_piece(token, div(unit, 2)) * 16 + mod(unit, 2) * 8
                call("iso_load8", at(b, 0), at(self.memory, base + place))
            else:
                call("iso_load16", at(b, 0), at(self.memory, base + unit * 16))
            for row in range(self.tile.rows):
                at_ = (row * self.tile.columns + column) * 8
                for pair in range(2):
                    if self.codes:
                        operands = at(a, row * 8 + pair * 4), at(b, 0)
                        call(self.layout.product_name, at(self.sums, at_ + 4 * pair), *operands)
                        continue
                    for half in range(2):
                        operand = at(a, row * 16 + pair * 8 + half * 4)
                        call("iso_mma_f16", at(self.sums, at_ + 4 * pair), operand, at(b, 2 * half))
            if self.totals is not None:
                call("iso_mma_s8u8", at(self.totals, column * 4), at(ones, 0), at(b, 0))
        if not self.direct:
            size = self.weights.group_size // 32
            with when(True if size <= 1 else equal(mod(index + 1, size), 0)):
                self._scale(div(index, max(1, size)))

    def _panel(self, row: int) -> Any:
        """The lane's panel of a 32-row piece, in the block."""
        return (self.warp_n * self.tile.rows + row) * 2 + self.half

    def _weights(self, row: int, unit: Any, whole: Any, index: Any, slot: Any, a: Any, first: int) -> None:
        base = slot + self._panel(row) * self.panel_bytes
        registers = local(4 * self.pieces, "uint32")
        for j in range(0 if self.fp8 else self.pieces):
            piece = (
                self.quad
                if self.pieces == 1
                else 4 * j + self.quad
                if self.pieces == 2
                else self.quad * 4 + j
            )
            call("iso_load16", at(registers, 4 * j), at(self.memory, base + self._place(unit, piece)))
        for j in range(4 if self.fp8 else 0):
            piece = 2 * j + div(self.quad, 2)
            source = base + self._place(unit, piece) + mod(self.quad, 2) * 8
            call("iso_load8", at(registers, 2 * j), at(self.memory, source))
        zeros = None
        if not self.codes and self.weights.offsets:
            zeros = self._zeros(row, self._group(index))
        for i in range(4):
            if self.codes:
                pair = local(2, "uint32")
                self.layout.byte_words(registers, i, whole, pair)
                for half in range(2):
                    put(a, first + (i // 2) * 4 + half * 2 + i % 2, get(pair, half))
                continue
            four = local(4, "uint32")
            self.layout.halves(registers, i, whole, four, zeros, 0)
            for word in range(4):
                put(a, first + (i // 2) * 8 + (word // 2) * 4 + (word % 2) * 2 + i % 2, get(four, word))

    def _group(self, index: Any) -> Any:
        return div(index, self.weights.group_size // 32) if self.weights.grouped else 0

    def _scale_index(self, row: int, group: Any) -> Any:
        panels = self.spec.linear.packed // LANES
        panel = T.min(self.block_n * (self.tile.features // LANES) + self._panel(row), T.int32(panels - 1))
        if self.weights.grouped and self.spec.kp // 32 % self.steps:
            # The last stage is not full; its empty steps have sums of 0, which any scale leaves.
            group = T.min(group, T.int32(self.spec.kp // self.weights.group_size - 1))
        return self.weights.scale_index(self.spec.kp, panel, group, self.quad)

    def _zeros(self, row: int, group: Any) -> Any:
        stored = local(1, "uint32")
        if self.weights.zero:
            call("iso_load4", at(stored, 0), at(self.frame["zero"], self._scale_index(row, group)))
        return self.weights.zeros(get(stored, 0), self.spec.activations)

    def _scale(self, group: Any) -> None:
        """Scale the sums of a group into `scaled` and start the next."""
        for row in range(self.tile.rows):
            words, size = local(2, "uint32"), self.weights.scale_bytes
            call(f"iso_load{size}", at(words, 0), at(self.frame["scale"], self._scale_index(row, group)))
            scales = self.weights.scales(words)
            zeros = self._zeros(row, group) if self.totals is not None else None
            for column in range(self.tile.columns):
                for i in range(8):
                    at_ = (row * self.tile.columns + column) * 8 + i
                    found = self._centred(at_, i, column, zeros)
                    put(self.scaled, at_, get(self.scaled, at_) + scales[(i // 4) * 2 + i % 4 // 2] * found)
                    put(self.sums, at_, tirx.const(0, self.kind))
        if self.totals is not None:
            self._clear(self.totals, "int32")

    def _centred(self, at_: int, i: int, column: int, zeros: Any) -> Any:
        found = get(self.sums, at_)
        if zeros is not None:
            found = found - get(zeros, (i // 4) * 2 + i % 4 // 2) * get(self.totals, column * 4 + i % 2)
        return T.cast(found, "float32") if self.kind == "int32" else found

    # -- results

    def _finish(self) -> None:
        linear = self.spec.linear
        for row in range(self.tile.rows):
            zeros = self._zeros(row, 0) if self.totals is not None and self.direct else None
            panel = bind(self.block_n * (self.tile.features // LANES) + self._panel(row))
            for column in range(self.tile.columns):
                for i in range(8):
                    offset = (i // 4) * 2 + i % 4 // 2
                    packed_row = bind(panel * LANES + self.quad * 4 + offset)
                    local_token = (self.warp_m * self.tile.columns + column) * 8 + self.t * 2 + i % 2
                    token = bind(self.block_m * self.tile.tokens + local_token)
                    at_ = (row * self.tile.columns + column) * 8 + i
                    there = wide(token) < self.frame.size(linear.rows)
                    result = self._value(at_, i, column, zeros, packed_row, token, there)
                    if linear.gated:
                        # Gate and up are the two panels of a piece: lanes 16 apart.
                        up = value("float32", "iso_shuffle_xor", result, 16)
                        feature = bind(div(panel, 2) * LANES + self.quad * 4 + offset)
                        there = T.And(there, equal(self.half, 0))
                    else:
                        up, feature = None, packed_row
                    with when(T.And(there, feature < linear.n)):
                        linear.finish(self.frame, token, feature, result, up)

    def _value(self, at_: int, i: int, column: int, zeros: Any, row: Any, token: Any, there: Any) -> Any:
        """A sum with everything that comes before the bias; rows and tokens that are not there read the first."""
        total = get(self.scaled, at_) if not self.direct else self._centred(at_, i, column, zeros)
        packed = self.spec.linear.packed
        safe = row if packed % self.tile.features == 0 else T.min(row, T.int32(packed - 1))
        total = self.weights.finish(self.frame, total, safe)
        if self.spec.linear.outliers:
            line = T.Select(there, wide(token) * packed, T.int64(0))
            total = total + get(self.frame["outliers"], line + wide(safe))
        if not self.codes:
            return bind(total)
        if self.fp8:
            at_scale: Any = 0 if self.spec.static_params else T.Select(there, wide(token), T.int64(0))
            return bind(get(self.frame["params"], at_scale) * (total * self.layout.unit()))
        pair: Any = 0 if self.spec.static_params else T.Select(there, wide(token) * 2, T.int64(0))
        s, z = get(self.frame["params"], pair), get(self.frame["params"], pair + 1)
        return bind(s * (total - z * get(self.frame["wsum"], safe)))
