"""Products of 2:4 sparse int8 weights on sparse tensor cores, from 16 rows of activations on.

A block computes 64 packed rows for 64 tokens, a warp 32 of both. Values, their indices and activations come by
asynchronous copies into a ring of `STAGES`, 128 inputs (64 stored values a row) at a time, which are two products of 64
inputs. A lane reads 16 consecutive stored values of its rows and the indices of a whole row, so which inputs a product
meets at which place follows from the weights, and activations are read to match:

    stored values   product m, operand word 2 i + (row >= 8): values 16 t + 8 m + 4 i .. + 3
    indices         word w of a row: byte w + 2 m of each 4 bytes of the row's 16
    activations     product m, word n: inputs 64 (n % 2) + 32 (t / 2) + 16 m + 8 (n / 2) + 4 (t % 2) .. + 3

Eight bytes of activations are stored at places permuted by the token, so that the 32 lanes of a read hit 32 banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES
from ....compiler.dialect.sparse_groups import BLOCK, block_inputs
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
    value,
    when,
    wide,
)
from .epilogue import Linear
from .sparse_encodings import Encoding

LAYOUT = "2:4"
FEW_ROWS = 15
"""Rows up to which a warp an output is better: half of a product's columns would be empty."""
STAGES = 3
ROWS, TOKENS, THREADS = 64, 64, 128
"""Packed rows and tokens of a block, and its threads."""
INPUTS = block_inputs(LAYOUT)
INDICES = BLOCK // 4
"""Bytes of the indices of a row in a stage."""
COLUMNS = 4
"""8-token pieces of a warp."""
STAGE_BYTES = ROWS * (BLOCK + INDICES) + TOKENS * INPUTS


@dataclass(frozen=True)
class SparseGemm:
    """The kernel; activations have `width` codes a row, a multiple of 8."""

    linear: Linear
    encoding: Encoding
    width: int
    static_params: bool = False

    @property
    def name(self) -> str:
        """The kernel's name."""
        pair = "s" if self.static_params else ""
        return f"sparse_gemm_{self.encoding.tag}_a8{pair}_{self.linear.tag}_{self.width}"

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        linear, rows = self.linear, self.linear.rows
        pair = (2,) if self.static_params else (rows, 2)
        return [
            Tensor("u", (rows, self.width), "uint8"), Tensor("params", pair, "float32"), *self.encoding.tensors(),
            Tensor("scale", (linear.packed,), "float32"), Tensor("wsum", (linear.packed,), "float32"),
            *linear.tensors(),
        ]  # fmt: skip

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        grid = [-(-self.linear.packed // ROWS), ceil_div(frame.size(self.linear.rows), TOKENS)]
        with launch(grid, THREADS) as ((block_n, block_m), tx):
            _Body(self, frame, block_n, block_m, tx).emit()


class _Body:
    """The kernel while it is written."""

    def __init__(self, spec: SparseGemm, frame: Frame, block_n: Any, block_m: Any, tx: Any) -> None:
        self.spec, self.frame, self.block_n, self.block_m, self.tx = spec, frame, block_n, block_m, tx
        self.blocks = -(-spec.linear.k // INPUTS)
        warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
        self.g, self.t = bind(div(lane, 4)), bind(mod(lane, 4))
        self.warp_n, self.warp_m = bind(mod(warp, 2)), bind(div(warp, 2))
        self.memory = shared_dynamic(STAGES * STAGE_BYTES)
        self.sums = local(2 * COLUMNS * 4, "int32")
        for i in range(2 * COLUMNS * 4):
            put(self.sums, i, T.int32(0))

    def emit(self) -> None:
        for ahead in range(STAGES - 1):
            self._copy(ahead)
        with loop(0, self.blocks) as stage:
            call("iso_copy_wait", STAGES - 2)
            sync()
            self._copy(stage + (STAGES - 1))
            self._multiply(bind(mod(stage, STAGES) * STAGE_BYTES))
        self._finish()

    # -- copies

    def _copy(self, stage: Any) -> None:
        """Start the copies of a stage; an empty group of copies where there is none."""
        slot = bind(mod(stage, STAGES) * STAGE_BYTES)
        with when(stage < self.blocks):
            self._copy_rows("values", BLOCK, stage, slot)
            self._copy_rows("places", INDICES, stage, slot + ROWS * BLOCK)
            self._copy_tokens(stage, slot + ROWS * (BLOCK + INDICES))
        call("iso_copy_commit")

    def _copy_rows(self, name: str, size: int, stage: Any, to: Any) -> None:
        """`size` bytes of each row; rows that are not there are the last one again, and nobody keeps their sums."""
        pieces = size // 16
        with loop(0, -(-ROWS * pieces // THREADS)) as turn:
            item = bind(turn * THREADS + self.tx)
            with when(True if ROWS * pieces % THREADS == 0 else item < ROWS * pieces):
                row = T.min(self.block_n * ROWS + div(item, pieces), T.int32(self.spec.linear.packed - 1))
                source = (wide(row) * self.blocks + wide(stage)) * size + wide(mod(item, pieces) * 16)
                call("iso_copy16", at(self.memory, to + item * 16), at(self.frame[name], source), 16)

    def _copy_tokens(self, stage: Any, to: Any) -> None:
        width, pieces = self.spec.width, INPUTS // 8
        with loop(0, TOKENS * pieces // THREADS) as turn:
            item = bind(turn * THREADS + self.tx)
            token, piece = bind(div(item, pieces)), bind(mod(item, pieces))
            where, k = bind(wide(self.block_m * TOKENS + token)), bind(stage * INPUTS + piece * 8)
            there = T.And(where < self.frame.size(self.spec.linear.rows), k < width)
            index = T.Select(there, where * width + wide(k), T.int64(0))
            place = token * INPUTS + T.bitwise_xor(piece, self._swizzle(token)) * 8
            count = T.Select(there, T.int32(8), T.int32(0))
            call("iso_copy8", at(self.memory, to + place), at(self.frame["u"], index), count)

    def _swizzle(self, token: Any) -> Any:
        """What the numbers of 8-byte pieces are permuted with: bits 0, 1 and 3, which the lanes of a read share."""
        low = mod(token, 8)
        return mod(low, 4) + div(low, 4) * 8

    # -- products

    def _multiply(self, slot: Any) -> None:
        """A stage: the operands of two pieces of 16 rows, then each column of tokens."""
        values, indices = local(2 * 2 * 4, "uint32"), local(2 * 2, "uint32")
        for piece in range(2):
            first = bind((self.warp_n * 2 + piece) * LANES)
            for half in range(2):
                row = first + self.g + 8 * half
                place = slot + row * BLOCK + self.t * 16
                call("iso_load16", at(values, (piece * 2 + half) * 4), at(self.memory, place))
            stored = local(4, "uint32")
            row = first + self.g + mod(self.t, 2) * 8
            call("iso_load16", at(stored, 0), at(self.memory, slot + ROWS * BLOCK + row * INDICES))
            for m in range(2):
                byte = div(self.t, 2) + 2 * m
                put(indices, piece * 2 + m, value("uint32", "iso_byte_of_four", at(stored, 0), byte))
        for column in range(COLUMNS):
            token = bind((self.warp_m * COLUMNS + column) * 8 + self.g)
            base = bind(slot + ROWS * (BLOCK + INDICES) + token * INPUTS + mod(self.t, 2) * 4)
            swizzle = bind(self._swizzle(token))
            for m in range(2):
                b = local(4, "uint32")
                for n in range(4):
                    unit = 8 * (n % 2) + 4 * div(self.t, 2) + 2 * m + n // 2
                    call("iso_load4", at(b, n), at(self.memory, base + T.bitwise_xor(unit, swizzle) * 8))
                for piece in range(2):
                    a = local(4, "uint32")
                    for word in range(4):
                        put(a, word, get(values, (piece * 2 + word % 2) * 4 + 2 * m + word // 2))
                    sums = at(self.sums, (piece * COLUMNS + column) * 4)
                    call("iso_mma_sparse_s8u8", sums, at(a, 0), at(b, 0), get(indices, piece * 2 + m))

    # -- results

    def _finish(self) -> None:
        linear = self.spec.linear
        panel = bind(self.block_n * (ROWS // LANES) + self.warp_n * 2)
        for column in range(COLUMNS):
            for i in range(4):
                row = self.g + 8 * (i // 2)
                token = bind(
                    self.block_m * TOKENS + (self.warp_m * COLUMNS + column) * 8 + self.t * 2 + i % 2
                )
                there = wide(token) < wide(self.frame.size(linear.rows))
                for piece in range(1 if linear.gated else 2):
                    packed = panel * LANES + piece * LANES + row
                    feature = bind(div(panel, 2) * LANES + row if linear.gated else packed)
                    with when(T.And(there, feature < linear.n)):
                        up = self._value(1, column, i, packed + LANES, token) if linear.gated else None
                        linear.finish(
                            self.frame, token, feature, self._value(piece, column, i, packed, token), up
                        )

    def _value(self, piece: int, column: int, i: int, row: Any, token: Any) -> Any:
        """A sum with everything that comes before the bias."""
        frame, total = self.frame, get(self.sums, (piece * COLUMNS + column) * 4 + i)
        pair: Any = 0 if self.spec.static_params else wide(token) * 2
        s, z = get(frame["params"], pair), get(frame["params"], pair + 1)
        scaled = T.cast(total, "float32") * get(frame["scale"], row)
        return bind(s * (scaled - z * get(frame["wsum"], row)))
