"""Attention of few queries over a long cache of keys and values: keys are split over blocks, then combined.

A block takes one key head of one sample, up to `ROWS` of the queries that share it (heads of its group, and
positions), and a range of keys. Eight lanes share a key: each holds an eighth of its depth (pieces of 4 floats, so
that eight lanes read 128 consecutive bytes), 32 keys are on their way in a block. Every eight lanes keep their own
maximum, sum and weighted values; they meet in shared memory at the end:

    m = max_i m_i,   l = sum_i l_i e^(m_i - m),   o = sum_i o_i e^(m_i - m)

and so do the ranges of the blocks, in a second kernel, unless there is only one. A query that sees nothing has l = 0
and gives 0.

Keys and values that are codes are read one key ahead as they are stored, and decoded in registers (`cache_lanes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.cache_packing import pair_count, row_bytes
from .builder import (
    Frame,
    Size,
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
    mod,
    put,
    shared,
    sync,
    value,
    when,
    wide,
)
from .cache_lanes import CacheRow, piece_start, pieces_of
from .layouts import NATURAL

ROWS, WARPS = 4, 8
"""Queries and warps of a block, unless tuned. A warp takes four keys at a time."""
LOWEST = -3.0e38
"""Stands for minus infinity in running maxima: differences stay finite."""


@dataclass(frozen=True)
class Attention:
    """Shapes and options that all kernels of an attention share.

    mask: sizes of the mask's dimensions (1: broadcast), or None. q_heads, k_heads, v_heads: of the tensors, of which
    the operator uses `heads` and `kv_heads` from its starts on. bits: of keys and values that are codes, head by head
    with pairs for each token (`cache_packing`); 0: they are floats. pair_group: dimensions that share a pair, 0: all.
    """

    batch: Size
    queries: Size
    keys: Size
    heads: int
    kv_heads: int
    depth: int
    width: int
    q_heads: int
    k_heads: int
    v_heads: int
    q_start: int
    k_start: int
    v_start: int
    scale: float
    causal: bool
    softcap: float
    mask: tuple[Size, ...] | None = None
    mask_dtype: str = "bool"
    bits: int = 0
    pair_group: int = 0

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def tag(self) -> str:
        """A part of kernels' names."""
        mask = (
            "" if self.mask is None else self.mask_dtype + "".join("1" if s == 1 else "n" for s in self.mask)
        )
        numbers = (
            self.heads,
            self.kv_heads,
            self.depth,
            self.width,
            self.q_heads,
            self.k_heads,
            self.v_heads,
        )
        starts = (self.q_start, self.k_start, self.v_start)
        codes = f"a{self.bits}g{self.pair_group}" if self.bits else ""
        options = f"{self.scale:.8g}_{self.softcap:g}{'c' if self.causal else ''}{mask}{codes}"
        text = "_".join(map(str, (*numbers, *starts, options)))
        return text.replace(".", "p").replace("-", "m").replace("+", "")

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        b, s, t = self.batch, self.queries, self.keys
        found = [Tensor("q", (b, s, self.q_heads, self.depth), "float32")]
        for name, heads, size in (("k", self.k_heads, self.depth), ("v", self.v_heads, self.width)):
            if self.bits:
                found.append(Tensor(name, (b, heads, t, row_bytes(size, self.bits)), "uint8"))
                found.append(Tensor(f"{name}_params", (b, heads, t, self.pairs(size) * 2), "float32"))
            else:
                found.append(Tensor(name, (b, t, heads, size), "float32"))
        if self.mask is not None:
            found.append(Tensor("mask", self.mask, self.mask_dtype))
        return found

    def pairs(self, size: int) -> int:
        """Pairs of a token's codes of so many dimensions."""
        return pair_count(size, self.pair_group)

    def output(self) -> Tensor:
        """The result."""
        return Tensor("y", (self.batch, self.queries, self.heads, self.width), "float32")

    def offset(self, frame: Frame, name: str, sample: Any, position: Any, head: Any) -> Any:
        """Index of a row of q, k, v or y."""
        sizes = {
            "q": (self.queries, self.q_heads, self.depth),
            "k": (self.keys, self.k_heads, self.depth),
            "v": (self.keys, self.v_heads, self.width),
            "y": (self.queries, self.heads, self.width),
        }
        length, heads, depth = sizes[name]
        return ((wide(sample) * wide(frame.size(length)) + wide(position)) * heads + wide(head)) * depth

    def floats(
        self, frame: Frame, name: str, sample: Any, position: Any, head: Any, start: Any, target: Any
    ) -> None:
        """Four dimensions of a row of q, k or v from `start` on, a multiple of 4, to the floats at `target`."""
        size = self.width if name == "v" else self.depth
        if self.bits and name != "q":
            codes, pair = self._codes(frame, name, sample, position, head, start)
            call("iso_cache_floats4", target, codes, pair, start, self.bits)
            return
        source = at(frame[name], self.offset(frame, name, sample, position, head) + wide(start))
        call("iso_load_floats4", target, source, size - start, int(size % 4 == 0))

    def halves(
        self, frame: Frame, name: str, sample: Any, position: Any, head: Any, start: Any, target: Any
    ) -> None:
        """Eight dimensions of a row of q or k from `start` on, a multiple of 8, to the four words at `target`."""
        if self.bits and name != "q":
            codes, pair = self._codes(frame, name, sample, position, head, start)
            call("iso_cache_halves8", target, codes, pair, start, self.bits)
            return
        source = at(frame[name], self.offset(frame, name, sample, position, head) + wide(start))
        wide_loads = int(self.depth % 4 == 0)
        call("iso_halves_floats", target, source, self.depth - start, T.uint32(NATURAL), wide_loads)

    def _codes(
        self, frame: Frame, name: str, sample: Any, position: Any, head: Any, start: Any
    ) -> tuple[Any, Any]:
        """Addresses of a token's codes and of the pair of its dimensions from `start` on."""
        token = self.token(frame, sample, position, head)
        size = self.depth if name == "k" else self.width
        pair = token * (self.pairs(size) * 2)
        if self.pairs(size) > 1:
            pair = pair + wide(div(start, self.pair_group) * 2)
        return at(frame[name], token * row_bytes(size, self.bits)), at(frame[f"{name}_params"], pair)

    def token(self, frame: Frame, sample: Any, position: Any, head: Any) -> Any:
        """Number of a token among those of all heads of a cache of codes."""
        return (wide(sample) * self.kv_heads + wide(head)) * wide(frame.size(self.keys)) + wide(position)

    def logit(
        self, frame: Frame, score: Any, sample: Any, head: Any, query: Any, key: Any, cell: Any
    ) -> None:
        """Turn a product of q and k into a logit in `cell`: scale, cap and mask; -inf where the key is not visible."""
        score = score * T.float32(self.scale)
        if self.softcap > 0:
            score = value("float32", "tanhf", score / T.float32(self.softcap)) * T.float32(self.softcap)
        put(cell, 0, score)
        if self.mask is not None:
            index: Any = wide(0)
            for size, place in zip(self.mask, (sample, head, query, key), strict=True):
                index = index * wide(frame.size(size)) + (wide(0) if size == 1 else wide(place))
            entry = get(frame["mask"], index)
            if self.mask_dtype == "bool":
                with when(T.cast(entry, "int32") < 1):
                    put(cell, 0, T.float32(float("-inf")))
            else:
                put(cell, 0, get(cell, 0) + entry)
        if self.causal:
            with when(wide(key) > wide(query)):
                put(cell, 0, T.float32(float("-inf")))


def few_rows(shape: Attention) -> int:
    """Queries of a block, unless tuned: as many as registers hold, and no more than there are."""
    most = max(1, ROWS * 4 // max(4, pieces_of(shape.depth), pieces_of(shape.width)))
    return most if isinstance(shape.queries, str) else min(most, shape.queries * shape.group)


@dataclass(frozen=True)
class FewQueries:
    """The kernel over ranges of keys; with one range it writes the result itself."""

    shape: Attention
    splits: int
    rows: int = ROWS
    warps: int = WARPS

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"attend_few_{self.splits}_{self.shape.tag}"

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        return self.shape.inputs()

    def outputs(self) -> list[Tensor]:
        """Arguments that are written: the result, or its parts (weighted values, then maximum and sum) by range."""
        if self.splits == 1:
            return [self.shape.output()]
        s = self.shape
        return [Tensor("parts", (s.batch, s.queries, s.heads, self.splits, s.width + 2), "float32")]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        shape = self.shape
        rows = frame.size(shape.queries) * shape.group
        grid = [self.splits, frame.size(shape.batch) * shape.kv_heads, ceil_div(rows, self.rows)]
        with launch(grid, 32 * self.warps) as ((split, head, first), tx):
            _Few(self, frame, split, head, first, tx).emit()


class _Few:
    """The kernel while it is written."""

    def __init__(self, spec: FewQueries, frame: Frame, split: Any, head: Any, first: Any, tx: Any) -> None:
        self.spec, self.frame, self.shape, self.split, self.tx = spec, frame, spec.shape, split, tx
        self.sample, self.key_head = (
            bind(div(head, self.shape.kv_heads)),
            bind(mod(head, self.shape.kv_heads)),
        )
        self.first = first
        self.rows, self.threads, self.keys = spec.rows, 32 * spec.warps, 4 * spec.warps
        lane = bind(mod(tx, 32))
        self.part, self.slot = bind(mod(lane, 8)), bind(div(tx, 8))
        self.depth_pieces, self.width_pieces = pieces_of(self.shape.depth), pieces_of(self.shape.width)
        self.maximum, self.total = local(self.rows), local(self.rows)
        self.values = local(self.rows * self.width_pieces * 4)
        for i in range(self.rows):
            put(self.maximum, i, T.float32(LOWEST))
            put(self.total, i, T.float32(0))
        for i in range(self.rows * self.width_pieces * 4):
            put(self.values, i, T.float32(0))

    def _place(self, row: int) -> tuple[Any, Any, Any]:
        """Whether row `row` of the block is there, its position and its query head."""
        group = self.shape.group
        index = bind(self.first * self.rows + row)
        position = bind(div(index, group))
        there = wide(position) < wide(self.frame.size(self.shape.queries))
        return there, position, bind(self.key_head * group + mod(index, group))

    def _load(self, name: str, position: Any, head: Any, target: Any, first: int) -> None:
        """A lane's pieces of a row of floats, in the order of keys or values."""
        size = self.shape.width if name == "v" else self.shape.depth
        for piece in range(pieces_of(size)):
            start = piece_start(size, self.shape.bits, self.part, piece)
            self.shape.floats(
                self.frame, name, self.sample, position, head, start, at(target, first + 4 * piece)
            )

    def emit(self) -> None:
        frame, shape = self.frame, self.shape
        rows = [self._place(row) for row in range(self.rows)]
        queries = local(self.rows * self.depth_pieces * 4)
        for row, (there, position, head) in enumerate(rows):
            count = self.depth_pieces * 4
            call("iso_zero_floats", at(queries, row * count), count)
            with when(there):
                self._load("q", position, head + shape.q_start, queries, row * count)
        keys = bind(wide(frame.size(shape.keys)))
        # Ranges of whole rounds of the block.
        share = T.truncdiv(keys + (self.spec.splits - 1), wide(self.spec.splits))
        each = bind(T.truncdiv(share + (self.keys - 1), wide(self.keys)))
        first = bind(wide(self.split) * each * self.keys + wide(self.slot))
        held: list[CacheRow] = []
        if shape.bits:
            held = [CacheRow.empty(size, shape.bits, shape.pair_group) for size in (shape.depth, shape.width)]
            self._fetch(held, first, keys)
        with T.serial(wide(0), each) as round_:
            key = bind(first + round_ * self.keys)
            inside = bind(key < keys)
            k, v = local(self.depth_pieces * 4), local(self.width_pieces * 4)
            if held:
                for row_, target in zip(held, (k, v), strict=True):
                    row_.decode(target, self.part)
                self._fetch(held, key + self.keys, keys)  # arrives while this one is multiplied
            else:
                call("iso_zero_floats", at(k, 0), self.depth_pieces * 4)
                call("iso_zero_floats", at(v, 0), self.width_pieces * 4)
                with when(inside):
                    self._load("k", key, self.key_head + shape.k_start, k, 0)
                    self._load("v", key, self.key_head + shape.v_start, v, 0)
            for row in range(self.rows):
                self._update(row, rows[row], queries, k, v, key, inside)
        self._finish(rows)

    def _fetch(self, held: list[CacheRow], key: Any, keys: Any) -> None:
        """Start the loads of a token's codes, where there is one."""
        with when(key < keys):
            for name, row in zip(("k", "v"), held, strict=True):
                codes, params = self.frame[name], self.frame[f"{name}_params"]
                token = bind(self.shape.token(self.frame, self.sample, key, self.key_head))
                row.fetch(codes, params, token, self.part)

    def _update(
        self, row: int, place: tuple[Any, Any, Any], queries: Any, k: Any, v: Any, key: Any, inside: Any
    ) -> None:
        there, position, head = place
        count = self.depth_pieces * 4
        score: Any = T.float32(0)
        for i in range(count):
            score = score + get(queries, row * count + i) * get(k, i)
        score = bind(score)
        for mask in (4, 2, 1):
            score = bind(score + value("float32", "iso_shuffle_xor", score, mask))
        cell = local(1)
        put(cell, 0, T.float32(float("-inf")))
        with when(T.And(there, inside)):
            self.shape.logit(self.frame, score, self.sample, head, position, key, cell)
        new = bind(T.max(get(self.maximum, row), get(cell, 0)))
        kept = value("float32", "expf", get(self.maximum, row) - new)
        weight = value("float32", "expf", get(cell, 0) - new)
        put(self.maximum, row, new)
        put(self.total, row, get(self.total, row) * kept + weight)
        each = range(row * self.width_pieces * 4, (row + 1) * self.width_pieces * 4)
        with when(kept < T.float32(1)):  # seldom, after the first keys
            for at_ in each:
                put(self.values, at_, get(self.values, at_) * kept)
        for i, at_ in enumerate(each):
            put(self.values, at_, get(self.values, at_) + weight * get(v, i))

    def _finish(self, rows: list[tuple[Any, Any, Any]]) -> None:
        """Combine the block's groups of eight lanes, one row after another."""
        shape, _frame, groups = self.shape, self.frame, self.keys
        width = self.width_pieces * 32
        board, maxima, totals = shared(groups * width), shared(groups), shared(groups)
        for row, (there, position, head) in enumerate(rows):
            sync()
            for piece in range(self.width_pieces):
                start = piece_start(shape.width, shape.bits, self.part, piece)
                for i in range(4):
                    put(
                        board,
                        self.slot * width + start + i,
                        get(self.values, (row * self.width_pieces + piece) * 4 + i),
                    )
            with when(equal(self.part, 0)):
                put(maxima, self.slot, get(self.maximum, row))
                put(totals, self.slot, get(self.total, row))
            sync()
            highest: Any = get(maxima, 0)
            for g in range(1, groups):
                highest = T.max(highest, get(maxima, g))
            highest = bind(highest)
            with T.serial(T.int32(0), T.int32(-(-shape.width // self.threads))) as turn:
                d = bind(turn * self.threads + self.tx)
                sums = local(2)
                put(sums, 0, T.float32(0))
                put(sums, 1, T.float32(0))
                with when(T.And(d < shape.width, there)):
                    with T.serial(T.int32(0), T.int32(groups)) as g:
                        factor = value("float32", "expf", get(maxima, g) - highest)
                        put(sums, 0, get(sums, 0) + factor * get(board, g * width + d))
                        put(sums, 1, get(sums, 1) + factor * get(totals, g))
                    self._write(position, head, d, get(sums, 0), get(sums, 1), highest)

    def _write(self, position: Any, head: Any, d: Any, total: Any, weight: Any, highest: Any) -> None:
        shape, frame = self.shape, self.frame
        if self.spec.splits == 1:
            index = shape.offset(frame, "y", self.sample, position, head) + wide(d)
            put(frame["y"], index, T.Select(weight > T.float32(0), total / weight, T.float32(0)))
            return
        line = (wide(self.sample) * wide(frame.size(shape.queries)) + wide(position)) * shape.heads + wide(
            head
        )
        start = bind((line * self.spec.splits + wide(self.split)) * (shape.width + 2))
        put(frame["parts"], start + wide(d), total)
        with when(equal(d, 0)):
            put(frame["parts"], start + shape.width, highest)
            put(frame["parts"], start + shape.width + 1, weight)


@dataclass(frozen=True)
class Combine:
    """Ranges of keys → the result: a warp for each query and head."""

    shape: Attention
    splits: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"attend_combine_{self.splits}_{self.shape.heads}_{self.shape.width}"

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        return FewQueries(self.shape, self.splits).outputs()

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        return [self.shape.output()]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        shape, splits = self.shape, self.splits
        count = frame.size(shape.batch) * frame.size(shape.queries) * shape.heads
        with launch([ceil_div(count, WARPS)], 32 * WARPS) as ((block,), tx):
            row, lane = bind(wide(block) * WARPS + wide(div(tx, 32))), bind(mod(tx, 32))
            with when(row < count):
                start = bind(row * (splits * (shape.width + 2)))
                highest: Any = T.float32(LOWEST)
                for split in range(splits):
                    highest = T.max(
                        highest, get(frame["parts"], start + split * (shape.width + 2) + shape.width)
                    )
                highest = bind(highest)
                with T.serial(T.int32(0), T.int32(-(-shape.width // 32))) as turn:
                    d = bind(turn * 32 + lane)
                    sums = local(2)
                    put(sums, 0, T.float32(0))
                    put(sums, 1, T.float32(0))
                    with when(d < shape.width):
                        for split in range(splits):
                            part = start + split * (shape.width + 2)
                            factor = value(
                                "float32", "expf", get(frame["parts"], part + shape.width) - highest
                            )
                            put(sums, 0, get(sums, 0) + factor * get(frame["parts"], part + wide(d)))
                            put(sums, 1, get(sums, 1) + factor * get(frame["parts"], part + shape.width + 1))
                        y = T.Select(get(sums, 1) > T.float32(0), get(sums, 0) / get(sums, 1), T.float32(0))
                        put(frame["y"], row * shape.width + wide(d), y)
