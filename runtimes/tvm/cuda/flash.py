"""Attention of many queries: tiles of keys and values in shared memory, tensor cores, softmax as the tiles pass.

A warp takes 16 queries of one head, a block 64, and keys come 64 at a time (tuning may find other numbers of warps and
keys). Products are of halves with sums in float32, so queries, keys, weights and values are rounded to float16 (their
products with the softmax's sums are not):

    S = Q K^T     a lane's operands are 8 consecutive depths of a query and of a key: any order of depths will do
    O = P V       P is S's result as it lies in registers; V is stored transposed, two keys to a word

Running maxima and sums of a query are those of the four lanes that hold its scores. With causal masks the tiles
behind the block's last query are not visited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import ceil_to
from .attention import LOWEST, Attention
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
    mod,
    put,
    shared_dynamic,
    sync,
    value,
    when,
    wide,
)

KEYS, WARPS = 64, 4
"""Keys of a tile and warps of a block, unless tuned."""


@dataclass(frozen=True)
class ManyQueries:
    """The kernel."""

    shape: Attention
    keys: int = KEYS
    warps: int = WARPS

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"attend_many_{self.shape.tag}"

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        return self.shape.inputs()

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        return [self.shape.output()]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        shape = self.shape
        grid = [ceil_div(frame.size(shape.queries), 16 * self.warps), shape.heads, frame.size(shape.batch)]
        with launch(grid, 32 * self.warps) as ((block, head, sample), tx):
            _Body(self, frame, block, head, sample, tx).emit()


class _Body:
    """The kernel while it is written."""

    def __init__(self, spec: ManyQueries, frame: Frame, block: Any, head: Any, sample: Any, tx: Any) -> None:
        self.shape, self.frame, self.head, self.sample, self.tx = spec.shape, frame, head, sample, tx
        shape = spec.shape
        self.tile, self.threads, self.block_queries = spec.keys, 32 * spec.warps, 16 * spec.warps
        # Words of a row of transposed values: a bank for each of the lanes (g, t).
        self.words = spec.keys // 2 + 4
        self.key_head = bind(div(head, shape.group))
        warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
        self.g, self.t = bind(div(lane, 4)), bind(mod(lane, 4))
        self.block, self.first = block, bind(block * self.block_queries + warp * 16)
        self.steps = ceil_to(shape.depth, 32) // 32
        self.columns = ceil_to(shape.width, 8) // 8
        self.key_bytes = 64 * self.steps + (64 if self.steps % 2 == 0 else 0)
        self.memory = shared_dynamic(self.tile * self.key_bytes + self.columns * 8 * self.words * 4)
        self.values_at = self.tile * self.key_bytes
        self.queries = local(self.steps * 8, "uint32")
        self.sums = local(self.columns * 4)
        self.maximum, self.total = local(2), local(2)
        for i in range(self.columns * 4):
            put(self.sums, i, T.float32(0))
        for i in range(2):
            put(self.maximum, i, T.float32(LOWEST))
            put(self.total, i, T.float32(0))

    def emit(self) -> None:
        self._load_queries()
        keys = bind(wide(self.frame.size(self.shape.keys)))
        last: Any = keys
        if self.shape.causal:
            last = bind(T.min(keys, wide(self.block + 1) * self.block_queries))
        with T.serial(wide(0), T.truncdiv(last + (self.tile - 1), wide(self.tile))) as tile:
            first = bind(tile * self.tile)
            sync()
            self._load_keys(first, keys)
            self._load_values(first, keys)
            sync()
            scores = self._scores()
            self._softmax(scores, first, keys)
            self._weigh(scores)
        self._finish()

    # -- loads

    def _row(self, half: int) -> Any:
        """The lane's query: of the upper or lower eight of the warp."""
        return bind(self.first + self.g + 8 * half)

    def _load_queries(self) -> None:
        shape, frame = self.shape, self.frame
        for half in range(2):
            query = self._row(half)
            for step in range(self.steps):
                four = local(4, "uint32")
                call("iso_zero", at(four, 0), 4)
                with when(wide(query) < wide(frame.size(shape.queries))):
                    start = step * 32 + self.t * 8
                    shape.halves(
                        frame, "q", self.sample, query, self.head + shape.q_start, start, at(four, 0)
                    )
                for word in range(4):
                    # Operands of the two products of a step: words (0, 1) and (2, 3).
                    put(self.queries, step * 8 + (word // 2) * 4 + (word % 2) * 2 + half, get(four, word))

    def _load_keys(self, first: Any, keys: Any) -> None:
        shape, pieces = self.shape, self.steps * 4
        with T.serial(T.int32(0), T.int32(self.tile * pieces // self.threads)) as turn:
            item = bind(turn * self.threads + self.tx)
            row, piece = bind(div(item, pieces)), bind(mod(item, pieces))
            four = local(4, "uint32")
            call("iso_zero", at(four, 0), 4)
            with when(first + wide(row) < keys):
                key, head = first + wide(row), self.key_head + shape.k_start
                shape.halves(self.frame, "k", self.sample, key, head, piece * 8, at(four, 0))
            call("iso_store16", at(self.memory, row * self.key_bytes + piece * 16), at(four, 0))

    def _load_values(self, first: Any, keys: Any) -> None:
        """A thread takes two keys and four columns: four words of the transposed tile."""
        shape, quads = self.shape, self.columns * 2
        count = self.tile // 2 * quads
        with T.serial(T.int32(0), T.int32(-(-count // self.threads))) as turn:
            item = bind(turn * self.threads + self.tx)
            with when(True if count % self.threads == 0 else item < count):
                pair, quad = bind(mod(item, self.tile // 2)), bind(div(item, self.tile // 2))
                both = local(8)
                call("iso_zero_floats", at(both, 0), 8)
                for i in range(2):
                    key = first + wide(pair * 2 + i)
                    with when(key < keys):
                        head = self.key_head + shape.v_start
                        shape.floats(self.frame, "v", self.sample, key, head, quad * 4, at(both, 4 * i))
                for i in range(4):
                    word = local(1, "uint32")
                    put(word, 0, value("uint32", "iso_half2", get(both, i), get(both, 4 + i)))
                    index = self.values_at + ((quad * 4 + i) * self.words + pair) * 4
                    call("iso_store4", at(self.memory, index), get(word, 0))

    # -- products

    def _scores(self) -> Any:
        scores = local(self.tile // 8 * 4)
        for i in range(self.tile // 8 * 4):
            put(scores, i, T.float32(0))
        for tile in range(self.tile // 8):
            for step in range(self.steps):
                four = local(4, "uint32")
                place = (tile * 8 + self.g) * self.key_bytes + (step * 4 + self.t) * 16
                call("iso_load16", at(four, 0), at(self.memory, place))
                for half in range(2):
                    operand = at(self.queries, step * 8 + half * 4)
                    call("iso_mma_f16", at(scores, tile * 4), operand, at(four, half * 2))
        return scores

    def _softmax(self, scores: Any, first: Any, keys: Any) -> None:
        """Scores to weights, and the running maxima, sums and outputs of the lane's two queries with them."""
        shape = self.shape
        for half in range(2):
            query = self._row(half)
            highest = local(1)
            put(highest, 0, get(self.maximum, half))
            for tile in range(self.tile // 8):
                for i in range(2):
                    at_ = tile * 4 + half * 2 + i
                    key = bind(first + wide(tile * 8 + self.t * 2 + i))
                    cell = local(1)
                    put(cell, 0, T.float32(float("-inf")))
                    inside = key < keys
                    if shape.mask is not None:
                        inside = T.And(inside, wide(query) < wide(self.frame.size(shape.queries)))
                    with when(inside):
                        shape.logit(self.frame, get(scores, at_), self.sample, self.head, query, key, cell)
                    put(scores, at_, get(cell, 0))
                    put(highest, 0, T.max(get(highest, 0), get(cell, 0)))
            for mask in (1, 2):
                put(
                    highest,
                    0,
                    T.max(get(highest, 0), value("float32", "iso_shuffle_xor", get(highest, 0), mask)),
                )
            new = bind(get(highest, 0))
            kept = value("float32", "expf", get(self.maximum, half) - new)
            put(self.maximum, half, new)
            put(self.total, half, get(self.total, half) * kept)
            for tile in range(self.tile // 8):
                for i in range(2):
                    at_ = tile * 4 + half * 2 + i
                    put(scores, at_, value("float32", "expf", get(scores, at_) - new))
                    put(self.total, half, get(self.total, half) + get(scores, at_))
            for column in range(self.columns):
                for i in range(2):
                    at_ = column * 4 + half * 2 + i
                    put(self.sums, at_, get(self.sums, at_) * kept)

    def _weigh(self, scores: Any) -> None:
        for step in range(self.tile // 16):
            a = local(4, "uint32")
            for word in range(4):
                at_ = (2 * step + word // 2) * 4 + (word % 2) * 2
                put(a, word, value("uint32", "iso_half2", get(scores, at_), get(scores, at_ + 1)))
            for column in range(self.columns):
                b = local(2, "uint32")
                for half in range(2):
                    word = (column * 8 + self.g) * self.words + step * 8 + half * 4 + self.t
                    call("iso_load4", at(b, half), at(self.memory, self.values_at + word * 4))
                call("iso_mma_f16", at(self.sums, column * 4), at(a, 0), at(b, 0))

    def _finish(self) -> None:
        shape, frame = self.shape, self.frame
        for half in range(2):
            total: Any = get(self.total, half)
            for mask in (1, 2):
                total = bind(total + value("float32", "iso_shuffle_xor", total, mask))
            query = self._row(half)
            inverse = bind(T.Select(total > T.float32(0), T.float32(1) / total, T.float32(0)))
            for column in range(self.columns):
                for i in range(2):
                    d = column * 8 + self.t * 2 + i
                    with when(T.And(wide(query) < wide(frame.size(shape.queries)), d < shape.width)):
                        index = shape.offset(frame, "y", self.sample, query, self.head) + wide(d)
                        put(frame["y"], index, get(self.sums, column * 4 + half * 2 + i) * inverse)
