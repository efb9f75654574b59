"""Products of packed weights with few rows of activations, on tensor cores: weights stream past once.

A block computes a tile of two panels (32 packed rows) for up to 8 `tiles` tokens; its warps share the inputs between
them in chunks (a group, or 64 to 128 inputs) and add up through shared memory at the end. Weights and scales come by
asynchronous copies to a ring of `depth` chunks: a lane copies what it will read itself, so that the ring needs no
barrier, and 2 to 6 KB of every warp are on their way whatever the compiler does with registers. The tile of weights
is the 16-row operand of the product and the tokens its 8 columns: up to 8 tokens cost what one does. Products are of
int8 and uint8 (`codes`), of FP8 (`fp8`), or of halves where activations are floats, which are rounded to float16. A
group's sum is scaled in float32.

    codes:   y = s ( sum_g scale_g ( I_g - zero_g U_g ) - z wsum ) + bias,   I_g = sum u w
                                                                             U_g = sum u: a product with ones
    fp8:     y = s sum_g scale_g sum_k value[u] value[w] + bias
    floats:  y = sum_g scale_g sum_k x (w - zero_g) + bias

Outliers beside the weights are summed by the same warps while the first copies are on their way, a lane for each packed
row of the tile, and join the sums in shared memory.
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
    get,
    launch,
    local,
    loop,
    mod,
    put,
    shared_dynamic,
    sync,
    when,
    wide,
)
from .epilogue import Linear
from .layouts import CodebookLayout
from .weights import Activations, Weights

STEP = 32
"""Inputs of a step: four lanes, eight inputs each."""
TILE = 32
"""Packed rows of a block."""
DEPTH = 3
"""Chunks of the ring, unless tuned: one is multiplied while the others arrive."""
ACTIVE_WORDS = 32
"""Registers for activations that are loaded ahead, unless tuned."""
RING_LIMIT = 96 << 10
"""Most bytes of a block's ring: what every architecture has."""


@dataclass(frozen=True)
class Skinny:
    """One kernel: the linear, its weights, its activations and the number of 8-token tiles a block computes."""

    linear: Linear
    weights: Weights
    activations: Activations
    tiles: int
    static_params: bool = False
    warps: int = 8
    depth: int = DEPTH
    active_words: int = ACTIVE_WORDS

    @property
    def kp(self) -> int:
        """Inputs with padding."""
        return self.weights.padded(self.linear.k)

    @property
    def name(self) -> str:
        """The kernel's name."""
        kind = {"codes": "a8", "fp8": "f8", "float": "a16"}[self.activations]
        pair = "s" if self.static_params else ""
        return f"skinny_{self.weights.tag}_{kind}{pair}_{self.linear.tag}_t{self.tiles}"

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        rows, k = self.linear.rows, self.linear.k
        if self.activations != "float":
            width = 2 if self.activations == "codes" else 1
            pair = (width,) if self.static_params else (rows, width)
            first = [Tensor("u", (rows, self.kp), "uint8"), Tensor("params", pair, "float32")]
            last = [Tensor("wsum", (self.linear.packed,), "float32")] if width == 2 else []
        else:
            first, last = [Tensor("x", (rows, k), "float32")], []
        weights = self.weights.tensors(self.linear, self.kp)
        return [*first, *weights, *last, *self.linear.entries(), *self.linear.tensors()]

    def split(self) -> tuple[int, int, int]:
        """Steps of the inputs, steps of a chunk, and warps: as many as there are chunks for, and as the ring holds."""
        steps = self.kp // STEP
        wanted = self.weights.group_size // STEP if self.weights.grouped else 16 // self.weights.layout.words
        chunk = next(c for c in range(max(1, wanted), 0, -1) if steps % c == 0)
        step_bytes = 32 * sum(count for _, count in self.weights.layout.loads(0, 0))
        ring = self.depth * (
            chunk * step_bytes + 32 * self.weights.scale_bytes + (128 if self.weights.zero else 0)
        )
        return steps, chunk, max(1, min(self.warps, steps // chunk, RING_LIMIT // ring))

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        steps, chunk, warps = self.split()
        rows = frame.size(self.linear.rows)
        grid = [ceil_div(self.linear.packed, TILE), ceil_div(rows, 8 * self.tiles)]
        with launch(grid, 32 * warps) as ((tile, column), tx):
            _Body(self, frame, steps, chunk, warps, tile, column, tx).emit()


class _Body:
    """The kernel while it is written."""

    def __init__(
        self, spec: Skinny, frame: Frame, steps: int, chunk: int, warps: int, tile: Any, column: Any, tx: Any
    ) -> None:
        self.spec, self.frame, self.steps, self.chunk, self.warps = spec, frame, steps, chunk, warps
        self.layout, self.weights = spec.weights.layout, spec.weights
        self.codes, self.fp8 = spec.activations != "float", spec.activations == "fp8"
        self.kind = "int32" if spec.activations == "codes" else "float32"
        self.tile, self.column, self.tx = tile, column, tx
        self.warp, self.lane = bind(div(tx, 32)), bind(mod(tx, 32))
        self.g, self.t = bind(div(self.lane, 4)), bind(mod(self.lane, 4))
        self.quad = bind(mod(self.g, 4))
        panels = spec.linear.packed // LANES
        wanted = tile * 2 + div(self.g, 4)
        # An odd number of panels: the last tile reads its panel twice, and nobody keeps the second.
        self.panel = bind(T.min(wanted, T.int32(panels - 1)) if panels % 2 else wanted)
        self.step_bytes = 32 * sum(count for _, count in self.layout.loads(0, 0))
        self.zero_at = chunk * self.step_bytes + 32 * self.weights.scale_bytes
        self.chunk_bytes = self.zero_at + (128 if self.weights.zero else 0)
        board = 4 * warps * 8 * spec.tiles * TILE * (2 if spec.linear.outliers else 1)
        self.memory = shared_dynamic(max(spec.depth * warps * self.chunk_bytes, board))
        self.whole_units = not self.codes and spec.linear.k == spec.kp  # nothing behind a row is read
        self.active_words = 2 if self.codes else 8 if self.whole_units else 4
        self.ahead = max(1, spec.active_words // (spec.tiles * self.active_words))
        self.active = local(min(self.ahead, chunk) * spec.tiles * self.active_words, "uint32")
        rows, width = wide(frame.size(spec.linear.rows)), spec.kp if self.codes else spec.linear.k
        tokens = [wide((column * spec.tiles + tile_) * 8 + self.g) for tile_ in range(spec.tiles)]
        self.token_rows = [bind(T.min(token, rows - 1) * width) for token in tokens]
        self.accumulators = local(spec.tiles * 8)
        for i in range(spec.tiles * 8):
            put(self.accumulators, i, T.float32(0))

    def emit(self) -> None:
        self._prepare()
        chunks = self.steps // self.chunk
        rounds = -(-chunks // self.warps)
        even = chunks % self.warps == 0
        for ahead in range(self.spec.depth - 1):
            self._copy(ahead, chunks)
        if self.spec.linear.outliers:
            self._sum_outliers()
        with loop(0, rounds) as round_:
            self._copy(round_ + (self.spec.depth - 1), chunks)
            index = bind(round_ * self.warps + self.warp)
            first = index if even else bind(T.min(index, T.int32(chunks - 1)))
            self._load_activations(first * self.chunk, min(self.ahead, self.chunk))  # while weights arrive
            call("iso_copy_wait", self.spec.depth - 1)
            with when(True if even else index < chunks):
                self._multiply(index, self._slot(round_))
        self._reduce()

    def _prepare(self) -> None:
        """Tables that decoding needs."""
        self.extra: Any = None
        if isinstance(self.layout, CodebookLayout):
            self.extra = self.frame["codebooks"]
        elif "table" in self.frame:
            self.extra = local(8, "uint32")
            call("iso_table_bytes", at(self.extra, 0), at(self.frame["table"], 0))

    def _sum_outliers(self) -> None:
        """The lane's packed row with every token, over the warp's share of the row's entries."""
        spec, frame, tokens = self.spec, self.frame, 8 * self.spec.tiles
        self.beside = local(tokens)
        call("iso_zero_floats", at(self.beside, 0), tokens)
        panel: Any = self.tile * 2 + div(self.lane, LANES)
        panel = bind(T.min(panel, T.int32(spec.linear.packed // LANES - 1)))
        first = (get(frame["offsets"], panel) + self.warp) * LANES + mod(self.lane, LANES)
        call(
            "iso_outliers_few", at(self.beside, 0), tokens, at(frame["u" if self.codes else "x"], 0),
            wide(self.column * tokens), wide(frame.size(spec.linear.rows)), spec.kp if self.codes else spec.linear.k,
            at(frame["places"], 0), at(frame["values"], 0), first, get(frame["offsets"], panel + 1) * LANES,
            self.warps * LANES,
        )  # fmt: skip

    def _slot(self, round_: Any) -> Any:
        return bind((self.warp * self.spec.depth + mod(round_, self.spec.depth)) * self.chunk_bytes)

    def _copy(self, round_: Any, chunks: int) -> None:
        """Start the copies of the warp's chunk of a round; a group of copies even where there is none, to count
        them."""
        chunk = bind(round_ * self.warps + self.warp)
        slot = self._slot(round_)
        with when(chunk < chunks):
            for i in range(self.chunk):
                unit = bind((chunk * self.chunk + i) * 4 + self.t)
                self.layout.copy(
                    self.frame[self.layout.argument], self.panel, self.spec.kp, unit, self.quad, self.memory,
                    slot + i * self.step_bytes, self.lane,
                )  # fmt: skip
            index = self._scale_index(self._group(chunk))
            if self.weights.grouped:
                bytes_ = self.weights.scale_bytes
                to = slot + self.chunk * self.step_bytes + self.lane * bytes_
                call(f"iso_copy{bytes_}", at(self.memory, to), at(self.frame["scale"], index), bytes_)
            if self.weights.zero:
                to = slot + self.zero_at + self.lane * 4
                call("iso_copy4", at(self.memory, to), at(self.frame["zero"], index), 4)
        call("iso_copy_commit")

    def _group(self, chunk: Any) -> Any:
        return chunk if self.weights.grouped else 0

    def _multiply(self, chunk: Any, slot: Any) -> None:
        direct = not self.weights.grouped and self.kind == "float32"
        sums = self.accumulators if direct else local(self.spec.tiles * 8, self.kind)
        totals = local(self.spec.tiles * 4, "int32")
        if not direct:
            for i in range(self.spec.tiles * 8):
                put(sums, i, tirx.const(0, self.kind))
        if self.codes and self.weights.zero:
            for i in range(self.spec.tiles * 4):
                put(totals, i, T.int32(0))
        zeros = self._zeros(slot) if self.weights.zero or (self.weights.offsets and not self.codes) else None
        for i in range(self.chunk):
            unit = bind((chunk * self.chunk + i) * 4 + self.t)
            if i and i % self.ahead == 0:
                self._load_activations(chunk * self.chunk + i, min(self.ahead, self.chunk - i))
            registers = local(self.layout.words, "uint32")
            self.layout.fetch(self.memory, slot + i * self.step_bytes, self.lane, registers)
            if self.codes:
                self._step_codes(unit, registers, sums, totals, i % self.ahead)
            else:
                self._step_floats(unit, registers, sums, zeros, i % self.ahead)
        if not direct:
            self._scale(slot, sums, totals, zeros)

    def _zeros(self, slot: Any) -> Any:
        stored = local(1, "uint32")
        if self.weights.zero:
            call("iso_load4", at(stored, 0), at(self.memory, slot + self.zero_at + self.lane * 4))
        return self.weights.zeros(get(stored, 0), self.spec.activations)

    def _scale_index(self, group: Any) -> Any:
        return self.weights.scale_index(self.spec.kp, self.panel, group, self.quad)

    def _scales(self, slot: Any) -> list[Any]:
        """Scales of the lane's four rows, float32."""
        if not self.weights.grouped:
            return [T.float32(1)] * 4
        words, size = local(2, "uint32"), self.weights.scale_bytes
        source = at(self.memory, slot + self.chunk * self.step_bytes + self.lane * size)
        call(f"iso_load{size}", at(words, 0), source)
        return self.weights.scales(words)

    def _load_activations(self, first: Any, count: int) -> None:
        """Start the loads of some steps' activations, together.

        There is no branch around them, which would make each wait for the one before: lanes whose token is not there
        read the last one's, and nobody keeps the sums of their columns.
        """
        for i in range(count):
            unit = bind((first + i) * 4 + self.t)
            for tile in range(self.spec.tiles):
                place = (i * self.spec.tiles + tile) * self.active_words
                source = self.token_rows[tile] + wide(unit * 8)
                if self.codes:
                    call("iso_load8", at(self.active, place), at(self.frame["u"], source))
                elif self.whole_units:
                    call("iso_load16", at(self.active, place), at(self.frame["x"], source))
                    call("iso_load16", at(self.active, place + 4), at(self.frame["x"], source + 4))
                else:
                    k, order = self.spec.linear.k, T.uint32(self.layout.order)
                    row = at(self.frame["x"], source)
                    call(
                        "iso_halves_floats", at(self.active, place), row, k - unit * 8, order, int(k % 4 == 0)
                    )

    def _step_codes(self, unit: Any, registers: Any, sums: Any, totals: Any, step: int) -> None:
        a = local(8, "uint32")
        for row in range(4):
            pair = local(2, "uint32")
            self.layout.byte_words(registers, row, unit, pair)
            for half in range(2):
                put(a, (row // 2) * 4 + half * 2 + row % 2, get(pair, half))
        if self.spec.weights.zero:
            ones = local(4, "uint32")
            for i in range(4):
                put(ones, i, T.uint32(0x01010101))
        for tile in range(self.spec.tiles):
            b = at(self.active, (step * self.spec.tiles + tile) * self.active_words)
            for pair_ in range(2):
                call(self.layout.product_name, at(sums, tile * 8 + pair_ * 4), at(a, pair_ * 4), b)
            if self.spec.weights.zero:
                call("iso_mma_s8u8", at(totals, tile * 4), at(ones, 0), b)

    def _step_floats(self, unit: Any, registers: Any, sums: Any, zeros: Any, step: int) -> None:
        columns = local(4 * self.spec.tiles, "uint32")
        for tile in range(self.spec.tiles):
            place = (step * self.spec.tiles + tile) * self.active_words
            if self.whole_units:
                order = T.uint32(self.layout.order)
                call("iso_halves_eight", at(columns, 4 * tile), at(self.active, place), order)
            else:
                for word in range(4):
                    put(columns, 4 * tile + word, get(self.active, place + word))
        for index in range(self.layout.passes):
            a = local(16, "uint32")
            for row in range(4):
                four = local(4, "uint32")
                extra = zeros if self.weights.offsets else self.extra
                self.layout.halves(registers, row, unit, four, extra, index)
                if self.spec.weights.scale == "e4m3":
                    self._scale_halves(unit, row, four)
                for word in range(4):
                    put(a, (row // 2) * 8 + (word // 2) * 4 + (word % 2) * 2 + row % 2, get(four, word))
            for tile in range(self.spec.tiles):
                for pair in range(2):
                    for half in range(2):
                        call(
                            "iso_mma_f16", at(sums, tile * 8 + pair * 4), at(a, pair * 8 + half * 4),
                            at(columns, tile * 4 + half * 2),
                        )  # fmt: skip

    def _scale_halves(self, unit: Any, row: int, four: Any) -> None:
        """NVFP4: groups of 16 are two units, so that a product spans two; the scale goes into the weights, exactly."""
        code = get(self.frame["scale"], self._scale_index(div(unit * 8, self.spec.weights.group_size)) + row)
        call("iso_halves_scale", at(four, 0), 1.0 / self.layout.factor, T.cast(code, "uint32"))

    def _scale(self, slot: Any, sums: Any, totals: Any, zeros: Any) -> None:
        scales = self._scales(slot)
        for tile in range(self.spec.tiles):
            for i in range(8):
                row, column = (i // 4) * 2 + i % 4 // 2, i % 2
                found = get(sums, tile * 8 + i)
                if self.kind == "int32":
                    if self.spec.weights.zero:
                        found = found - get(zeros, row) * get(totals, tile * 4 + column)
                    found = T.cast(found, "float32")
                at_ = tile * 8 + i
                put(self.accumulators, at_, get(self.accumulators, at_) + scales[row] * found)

    def _reduce(self) -> None:
        """Add up the warps' sums, and write the outputs."""
        spec, linear, tokens = self.spec, self.spec.linear, 8 * self.spec.tiles
        size = self.warps * tokens * TILE * (2 if linear.outliers else 1)
        board = T.decl_buffer((size,), "float32", data=self.memory.data, scope="shared.dyn", layout=None)
        sync()  # the ring is free
        for tile in range(spec.tiles):
            for i in range(8):
                row = div(self.g, 4) * LANES + self.quad * 4 + (i // 4) * 2 + i % 4 // 2
                token = tile * 8 + self.t * 2 + i % 2
                index = (self.warp * tokens + token) * TILE + row
                put(board, index, get(self.accumulators, tile * 8 + i))
        if linear.outliers:
            for token in range(tokens):
                index = ((self.warps + self.warp) * tokens + token) * TILE + self.lane
                put(board, index, get(self.beside, token))
        sync()
        width = LANES if linear.gated else TILE
        with loop(0, -(-tokens * width // (32 * self.warps))) as turn:
            item = bind(turn * (32 * self.warps) + self.tx)
            token, feature = bind(div(item, width)), bind(mod(item, width) + self.tile * width)
            where = bind(self.column * tokens + token)
            inside = T.And(item < tokens * width, feature < linear.n)
            with when(T.And(inside, wide(where) < self.frame.size(linear.rows))):
                row = bind(linear.packed_row(feature))
                up = self._value(board, token, where, row + LANES) if linear.gated else None
                linear.finish(self.frame, where, feature, self._value(board, token, where, row), up)

    def _value(self, board: Any, token: Any, where: Any, row: Any) -> Any:
        linear, weights = self.spec.linear, self.spec.weights
        total = bind(weights.finish(self.frame, self._sum(board, token, row, 0), row))
        if linear.outliers:
            beside = self._sum(board, token, row, self.warps)
            total = bind(total + beside * T.float32(linear.outlier_multiplier))
        if not self.codes:
            return total
        if self.fp8:
            s = get(self.frame["params"], 0 if self.spec.static_params else wide(where))
            return bind(s * (total * self.layout.unit()))
        pair = 0 if self.spec.static_params else wide(where) * 2
        s, z = get(self.frame["params"], pair), get(self.frame["params"], pair + 1)
        return bind(s * (total - z * get(self.frame["wsum"], row)))

    def _sum(self, board: Any, token: Any, row: Any, first: int) -> Any:
        """The sum of all warps' parts, from part `first` of the board on."""
        tokens, place = 8 * self.spec.tiles, row - self.tile * TILE
        total = get(board, (first * tokens + token) * TILE + place)
        for warp in range(1, self.warps):
            total = total + get(board, ((first + warp) * tokens + token) * TILE + place)
        return total
