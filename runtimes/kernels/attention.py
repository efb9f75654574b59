"""Attention in one pass: scores, scale, softcap, mask, softmax, values; one head, a block of queries.

Queries lie in the vector lanes. The scores of a block are computed transposed,
S^T[t, s] = sum_d K[t, d] Q^T[d, s], and so are the values, O^T[d, s] = sum_t V[t, d] P^T[t, s]. In both
products the left side is read one scalar at a time from the caller's own rows of K and V, and the right side
is a vector of queries. So K and V are never repacked, the softmax over t is vertical (no maximum or sum
across lanes anywhere), and both products are the same register tile. Only Q on the way in, O on the way out,
and masks that differ between queries are transposed, 16 x 16 floats in registers.

Keys are visited in blocks (`attention_keys`, a knob) with a running maximum and sum (online softmax), so that scores
never leave the first-level cache. A query that sees no key (all logits -inf) gives 0.

`attention_row` is for single queries (decoding), where most lanes would idle: there the lanes run along the
head dimension, and each key and value row is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .knobs import knob
from .math import exp, reduce_lanes, softmax_weight, tanh, transpose16

LANES = 32
NEG_INF = float("-inf")


@dataclass(frozen=True)
class View:
    """A part of a buffer from an element offset on.

    Scratch memory is one parameter cut into views: two pointers into it would break the promise that no
    parameter aliases another.
    """

    buffer: Any
    base: Any

    def load(self, offset: Any, lanes: int = 16) -> Any:
        return load(self.buffer, self.base + offset, lanes)

    def store(self, offset: Any, value: Any, lanes: int = 16) -> None:
        store(self.buffer, self.base + offset, value, lanes)


def _vector(value: float, lanes: int = 16) -> Any:
    return T.broadcast(T.float32(value), lanes)


def _i64(value: int) -> Any:
    return tirx.const(value, "int64")


def _tile(
    mr: int, nv: int, a: View, a_rows: list[Any], a_step: Any, b: View, first: int, depth: Any, acc: Any
) -> None:
    """acc[i, :] += sum_k a[a_rows[i] + k a_step] * b[k, first : first + 16 nv]."""
    with for_range(0, depth) as k:
        right = [bind(b.load(k * LANES + first + 16 * j)) for j in range(nv)]
        for i in range(mr):
            left = bind(T.broadcast(a.load(a_rows[i] + k * a_step, 1), 16))
            for j in range(nv):
                index = (i * nv + j) * 16
                store(acc, index, T.fma(left, right[j], load(acc, index)))


def _pack_queries(q: View, qt: View, q_row: Any, nq: Any, d: Any, scale: Any, nv: int) -> None:
    """qt[dim, lane] = scale * q[lane, dim]; lanes past the last query repeat it."""
    whole = bind(d // 16 * 16)
    for j in range(nv):
        offsets = [bind(tirx.min(_i64(16 * j + lane), nq - 1) * q_row) for lane in range(16)]
        with for_range(0, d // 16) as block:
            rows = [bind(q.load(offset + block * 16)) for offset in offsets]
            for i, column in enumerate(transpose16(rows)):
                qt.store((block * 16 + i) * LANES + 16 * j, column * T.broadcast(scale, 16))
        with for_range(whole, d) as dim:
            for lane, offset in enumerate(offsets):
                qt.store(dim * LANES + 16 * j + lane, q.load(offset + dim, 1) * scale, 1)


def _write_output(o: View, out: View, out_row: Any, nq: Any, dv: Any, inverse: list[Any], nv: int) -> None:
    """out[lane, dim] = o[dim, lane] * inverse[lane] for the first nq lanes."""
    whole = bind(dv // 16 * 16)
    for j in range(nv):
        with for_range(0, dv // 16) as block:
            columns = [bind(o.load((block * 16 + i) * LANES + 16 * j) * inverse[j]) for i in range(16)]
            for lane, row in enumerate(transpose16(columns)):
                with when(nq > 16 * j + lane):
                    out.store((16 * j + lane) * out_row + block * 16, row)
        with for_range(whole, dv) as dim:
            o.store(dim * LANES + 16 * j, o.load(dim * LANES + 16 * j) * inverse[j])
            with for_range(_i64(16 * j), tirx.min(nq, _i64(16 * j + 16))) as lane:
                out.store(lane * out_row + dim, o.load(dim * LANES + lane, 1), 1)


def _masked(kind: str, score: Any, mask: Any, lanes: int) -> Any:
    """Add a float mask, or put -inf where a boolean one is False."""
    if kind == "f32":
        return score + mask
    zero = T.uint8(0) if lanes == 1 else T.broadcast(T.uint8(0), lanes)
    return T.Select(mask != zero, score, T.float32(NEG_INF) if lanes == 1 else _vector(NEG_INF, lanes))


def _splat_element(buffer: Any, offset: Any) -> Any:
    return T.broadcast(load(buffer, offset, 1), 16)


def _apply_mask(
    kind: str, mask: View, p: View, nq: Any, t0: Any, count: Any, mask_s: Any, mask_t: Any, nv: int
) -> None:
    """Mask the scores p[t, lane], t = t0 .. t0 + count."""
    with T.If(mask_s == 0):
        with T.Then(), for_range(0, count) as t:  # one value for all queries: a padding mask
            value = bind(T.broadcast(mask.load((t0 + t) * mask_t, 1), 16))
            for j in range(nv):
                at = t * LANES + 16 * j
                p.store(at, _masked(kind, p.load(at), value, 16))
        with T.Else():
            for j in range(nv):
                offsets = [
                    bind(tirx.min(_i64(16 * j + lane), nq - 1) * mask_s + t0 * mask_t) for lane in range(16)
                ]
                vectors = bind(T.Select(mask_t == 1, count // 16, _i64(0)))
                with for_range(0, vectors) as block:
                    rows = [mask.load(offset + block * 16) for offset in offsets]
                    if kind == "u8":
                        rows = [T.cast(row, "float32x16") for row in rows]
                    for i, column in enumerate(transpose16([bind(row) for row in rows])):
                        at = (block * 16 + i) * LANES + 16 * j
                        score = p.load(at)
                        masked = score + column
                        if kind == "u8":
                            masked = T.Select(column != _vector(0.0), score, _vector(NEG_INF))
                        p.store(at, masked)
                with for_range(vectors * 16, count) as t:
                    for lane, offset in enumerate(offsets):
                        at = t * LANES + 16 * j + lane
                        p.store(at, _masked(kind, p.load(at, 1), mask.load(offset + t * mask_t, 1), 1), 1)


class Block:
    """Emits a block kernel. Up to 32 * sub queries; each group of 32 has its own running state in scratch.

    Keys and values are floats here; `fetch`, `key_rows` and `values` are what reads them.
    """

    def __init__(
        self,
        isa: Isa,
        vectors: int,
        key_block: int,
        keys_and_values: tuple[Any, ...],
        others: tuple[Any, ...],
    ) -> None:
        (self.q, self.mask_f, self.mask_b, self.out, self.scratch, self.nq, self.q_row, self.out_row, self.keys, self.d,
         self.dv, self.first_query, self.causal, self.mask_kind, self.mask_s, self.mask_t,
         self.scale, self.softcap) = others  # fmt: skip
        self.vectors, self.key_block = vectors, key_block
        wide = isa.registers == 32
        self.mr = knob("attention_tile")
        # AVX2 has registers for the sums of 16 lanes only: walk the two halves one after the other.
        self.parts = [list(range(vectors))] if wide else [[j] for j in range(vectors)]
        self.width = len(self.parts[0])
        self.acc = registers(self.mr * self.width, "float32")
        self.maxima, self.sums = registers(vectors, "float32"), registers(vectors, "float32")
        self.p = View(self.scratch, _i64(0))
        self.copies = _i64((self.key_block + 8) * LANES)
        self.states = bind(self.copies + self.key_block * self.start(*keys_and_values))
        self.state = bind((self.d + self.dv + 10) * LANES)

    def start(self, *keys_and_values: Any) -> Any:
        """Take over keys and values; returns the floats for each key that are copied to ``self.copies`` on."""
        self.k, self.v, self.k_row, self.v_row = keys_and_values
        self.v_width = bind((self.dv + 15) // 16 * 16)
        self.v_copy = View(self.scratch, self.copies)
        return self.v_width

    def enter(self, sub: Any) -> None:
        """Point the views at one group of queries."""
        at = bind(self.states + sub * self.state)
        self.qt = View(self.scratch, at)
        self.o = View(self.scratch, bind(at + self.d * LANES))
        self.running_max = View(self.scratch, bind(self.o.base + (self.dv + 8) * LANES))
        self.running_sum = View(self.scratch, bind(self.running_max.base + LANES))
        first = bind(sub * LANES)
        self.count = bind(tirx.min(self.nq - first, _i64(LANES)))
        self.q_view = View(self.q, bind(first * self.q_row))
        self.out_view = View(self.out, bind(first * self.out_row))
        self.mask_at = bind(first * self.mask_s)
        self.query = bind(self.first_query + first)
        seen = tirx.min(self.keys, self.query + self.count)
        self.visible = bind(T.Select(self.causal != 0, seen, self.keys))

    def emit(self) -> None:
        groups = bind((self.nq + LANES - 1) // LANES)
        with for_range(0, groups) as sub:
            self.enter(sub)
            _pack_queries(self.q_view, self.qt, self.q_row, self.count, self.d, self.scale, self.vectors)
            for j in range(self.vectors):
                self.running_max.store(16 * j, _vector(NEG_INF))
                self.running_sum.store(16 * j, _vector(0.0))
        # Keys outside, groups of queries inside: a block of K and V is read once for all of them.
        with for_range(0, (self.keys + self.key_block - 1) // self.key_block) as block:
            t0 = bind(block * self.key_block)
            self.fetch(t0)
            with for_range(0, groups) as sub:
                self.enter(sub)
                with when(self.visible > t0):
                    keys = bind(tirx.min(self.visible - t0, _i64(self.key_block)))
                    self.scores(t0, keys)
                    self.hide(t0, keys)
                    self.values(t0, keys, self.softmax(keys))
        with for_range(0, groups) as sub:
            self.enter(sub)
            self.finish()

    def _clear(self) -> None:
        for i in range(self.mr * self.width):
            store(self.acc, i * 16, _vector(0.0))

    def _store_tile(self, target: View, base: Any, part: list[int]) -> None:
        for i in range(self.mr):
            for w, j in enumerate(part):
                target.store((base + i) * LANES + 16 * j, load(self.acc, (i * self.width + w) * 16))

    def fetch(self, t0: Any) -> None:
        """Bring a block of V together: each tile of `values` visits every row, and rows may lie pages apart.

        Pays for itself where keys and values of a head do not stay in the second-level cache: from the
        second block of keys on.
        """
        with (
            when(self.keys > self.key_block),
            for_range(0, tirx.min(self.keys - t0, _i64(self.key_block))) as t,
        ):
            source, target = bind((t0 + t) * self.v_row), bind(t * self.v_width)
            with for_range(0, self.dv // 16) as i:
                self.v_copy.store(target + i * 16, load(self.v, source + i * 16))
            with for_range(self.dv // 16 * 16, self.dv) as i:
                self.v_copy.store(target + i, load(self.v, source + i, 1), 1)

    def key_rows(self, t0: Any, tokens: list[Any]) -> tuple[View, list[Any]]:
        """Where keys lie, and the offsets of these tokens of the block that starts at token t0."""
        return View(self.k, _i64(0)), [bind((t0 + token) * self.k_row) for token in tokens]

    def scores(self, t0: Any, keys: Any) -> None:
        """p[t, s] = sum_d k[t, d] q[s, d]."""
        with for_range(0, (keys + self.mr - 1) // self.mr) as tile:
            base = bind(tile * self.mr)
            view, rows = self.key_rows(t0, [tirx.min(base + i, keys - 1) for i in range(self.mr)])
            for part in self.parts:
                self._clear()
                _tile(self.mr, self.width, view, rows, _i64(1), self.qt, 16 * part[0], self.d, self.acc)
                self._store_tile(self.p, base, part)

    def hide(self, t0: Any, keys: Any) -> None:
        """Softcap, mask and causality."""
        with when(self.softcap > T.float32(0.0)), for_range(0, keys) as t:
            cap = T.broadcast(self.softcap, 16)
            for j in range(self.vectors):
                at = t * LANES + 16 * j
                self.p.store(at, cap * tanh(self.p.load(at) / cap))
        for code, kind, mask in ((1, "f32", self.mask_f), (2, "u8", self.mask_b)):
            with when(self.mask_kind == code):
                view = View(mask, self.mask_at)
                _apply_mask(kind, view, self.p, self.count, t0, keys, self.mask_s, self.mask_t, self.vectors)
        with when(tirx.all(self.causal != 0, t0 + keys - 1 > self.query)), for_range(0, keys) as t:
            limit = bind(T.broadcast(T.cast(t0 + t - self.query, "int32"), 16))
            for j in range(self.vectors):
                lanes = T.ramp(T.int32(16 * j), T.int32(1), 16)
                at = t * LANES + 16 * j
                self.p.store(at, T.Select(limit <= lanes, self.p.load(at), _vector(NEG_INF)))

    def softmax(self, keys: Any) -> list[Any]:
        """p = exp(p - maximum so far); returns the factors that bring earlier sums to the new maximum."""
        for j in range(self.vectors):
            store(self.maxima, 16 * j, self.running_max.load(16 * j))
        with for_range(0, keys) as t:
            for j in range(self.vectors):
                value = self.p.load(t * LANES + 16 * j)
                store(self.maxima, 16 * j, tirx.max(load(self.maxima, 16 * j), value))
        references, corrections = [], []
        for j in range(self.vectors):
            highest = bind(load(self.maxima, 16 * j))
            # -inf - -inf would be NaN: where nothing was seen so far, subtract 0.
            references.append(bind(T.Select(highest == _vector(NEG_INF), _vector(0.0), highest)))
            corrections.append(bind(softmax_weight(self.running_max.load(16 * j) - references[j])))
            self.running_max.store(16 * j, highest)
            store(self.sums, 16 * j, self.running_sum.load(16 * j) * corrections[j])
        with for_range(0, keys) as t:
            for j in range(self.vectors):
                at = t * LANES + 16 * j
                weight = bind(softmax_weight(self.p.load(at) - references[j]))
                self.p.store(at, weight)
                store(self.sums, 16 * j, load(self.sums, 16 * j) + weight)
        for j in range(self.vectors):
            self.running_sum.store(16 * j, load(self.sums, 16 * j))
        return corrections

    def values(self, t0: Any, keys: Any, corrections: list[Any]) -> None:
        """o[d, s] = o[d, s] * correction[s] + sum_t v[t, d] p[t, s]."""
        with T.If(self.keys > self.key_block):
            with T.Then():
                self.values_of(self.v_copy, self.v_width, t0, keys, corrections)
            with T.Else():
                self.values_of(View(self.v, _i64(0)), self.v_row, t0, keys, None)

    def values_of(self, v: View, v_row: Any, t0: Any, keys: Any, corrections: list[Any] | None) -> None:
        """The same from rows of values ``v_row`` apart; no corrections: these are all keys."""
        with for_range(0, (self.dv + self.mr - 1) // self.mr) as tile:
            base = bind(tile * self.mr)
            columns = [bind(tirx.min(base + i, self.dv - 1)) for i in range(self.mr)]
            for part in self.parts:
                self._clear()
                if corrections is not None:
                    with when(t0 > 0):
                        for i in range(self.mr):
                            for w, j in enumerate(part):
                                old = self.o.load((base + i) * LANES + 16 * j)
                                store(self.acc, (i * self.width + w) * 16, old * corrections[j])
                _tile(self.mr, self.width, v, columns, v_row, self.p, 16 * part[0], keys, self.acc)
                self._store_tile(self.o, base, part)

    def finish(self) -> None:
        """out[s, d] = o[d, s] / sum[s]."""
        inverse = []
        for j in range(self.vectors):
            total = bind(self.running_sum.load(16 * j))
            # The largest logit has weight 1; a smaller sum is that of keys that are all hidden.
            inverse.append(bind(T.Select(total > _vector(0.5), _vector(1.0) / total, _vector(0.0))))
        with T.If(self.keys > 0):
            with T.Then():
                _write_output(self.o, self.out_view, self.out_row, self.count, self.dv, inverse, self.vectors)
            with T.Else(), for_range(0, self.count) as s, for_range(0, self.dv) as dim:
                self.out_view.store(s * self.out_row + dim, T.float32(0.0), 1)


def _emit_block(
    isa: Isa, q: Any, k: Any, v: Any, mask_f: Any, mask_b: Any, out: Any, scratch: Any, nq: Any, q_row: Any,
    k_row: Any, v_row: Any, *others: Any, vectors: int,
) -> None:  # fmt: skip
    shared = (q, mask_f, mask_b, out, scratch, nq, q_row, *others)
    Block(isa, vectors, knob("attention_keys"), (k, v, k_row, v_row), shared).emit()


def _row(
    isa: Isa,
    q: Any, k: Any, v: Any, mask_f: Any, mask_b: Any, out: Any, scratch: Any,
    k_row: Any, v_row: Any, keys: Any, d: Any, dv: Any,
    mask_kind: Any, mask_t: Any, scale: Any, softcap: Any,
) -> None:  # fmt: skip
    del isa
    together = knob("attention_together")  # keys whose dot products are in flight at once
    acc = registers(max(together, 4), "float32")
    parts = T.alloc_buffer((together,), "float32", scope="local", layout=None)
    highest = registers(1, "float32")
    total = registers(1, "float32")
    padded = bind((keys + 15) // 16 * 16)

    with for_range(0, (keys + together - 1) // together) as group:
        t0 = bind(group * together)
        rows = [bind(tirx.min(t0 + i, keys - 1) * k_row) for i in range(together)]
        for i in range(together):
            store(acc, 16 * i, _vector(0.0))
            store(parts, i, T.float32(0.0), 1)
        with for_range(0, d // 16) as block:
            query = bind(load(q, block * 16))
            for i in range(together):
                store(acc, 16 * i, T.fma(query, load(k, rows[i] + block * 16), load(acc, 16 * i)))
        with for_range(d // 16 * 16, d) as dim:
            for i in range(together):
                product = load(q, dim, 1) * load(k, rows[i] + dim, 1)
                store(parts, i, load(parts, i, 1) + product, 1)
        for i in range(together):
            store(scratch, t0 + i, (reduce_lanes(load(acc, 16 * i), add) + load(parts, i, 1)) * scale, 1)

    with when(softcap > T.float32(0.0)), for_range(0, padded // 16) as block:
        cap = T.broadcast(softcap, 16)
        store(scratch, block * 16, cap * tanh(load(scratch, block * 16) / cap))
    for code, kind, mask in ((1, "f32", mask_f), (2, "u8", mask_b)):
        with when(mask_kind == code):
            vectors = bind(T.Select(mask_t == 1, keys // 16, _i64(0)))
            with for_range(0, vectors) as block:
                masked = _masked(kind, load(scratch, block * 16), load(mask, block * 16), 16)
                store(scratch, block * 16, masked)
            with for_range(vectors * 16, keys) as t:
                store(scratch, t, _masked(kind, load(scratch, t, 1), load(mask, t * mask_t, 1), 1), 1)
    with for_range(keys, padded) as t:
        store(scratch, t, T.float32(NEG_INF), 1)

    store(highest, 0, _vector(NEG_INF))
    with for_range(0, padded // 16) as block:
        store(highest, 0, tirx.max(load(highest, 0), load(scratch, block * 16)))
    top = bind(reduce_lanes(load(highest, 0), tirx.max))
    reference = bind(T.Select(top == T.float32(NEG_INF), T.float32(0.0), top))
    store(total, 0, _vector(0.0))
    with for_range(0, padded // 16) as block:
        weight = bind(exp(load(scratch, block * 16) - T.broadcast(reference, 16)))
        store(scratch, block * 16, weight)
        store(total, 0, load(total, 0) + weight)
    denominator = bind(reduce_lanes(load(total, 0), add))
    inverse = bind(T.Select(denominator > T.float32(0.0), T.float32(1.0) / denominator, T.float32(0.0)))

    def values(begin: Any, vectors: int) -> None:
        for i in range(vectors):
            store(acc, 16 * i, _vector(0.0))
        with for_range(0, keys) as t:
            weight = bind(_splat_element(scratch, t))
            for i in range(vectors):
                store(acc, 16 * i, T.fma(weight, load(v, t * v_row + begin + 16 * i), load(acc, 16 * i)))
        for i in range(vectors):
            store(out, begin + 16 * i, load(acc, 16 * i) * T.broadcast(inverse, 16))

    with for_range(0, dv // 64) as block:
        values(block * 64, 4)
    with for_range(dv // 64 * 4, dv // 16) as block:
        values(block * 16, 1)
    with for_range(dv // 16 * 16, dv) as dim:
        store(parts, 0, T.float32(0.0), 1)
        with for_range(0, keys) as t:
            store(parts, 0, load(parts, 0, 1) + load(scratch, t, 1) * load(v, t * v_row + dim, 1), 1)
        store(out, dim, load(parts, 0, 1) * inverse, 1)


_POINTERS = (
    "q: const f32*, k: const f32*, v: const f32*, mask_f: const f32*, mask_b: const u8*, "
    "out: f32*, scratch: f32*"
)
_BLOCK = (
    f"{_POINTERS}, nq: i64, q_row: i64, k_row: i64, v_row: i64, out_row: i64, keys: i64, d: i64, dv: i64, "
    "first_query: i64, causal: i64, mask_kind: i64, mask_s: i64, mask_t: i64, scale: f32, softcap: f32"
)
_ROW = (
    f"{_POINTERS}, k_row: i64, v_row: i64, keys: i64, d: i64, dv: i64, "
    "mask_kind: i64, mask_t: i64, scale: f32, softcap: f32"
)

KERNELS = [
    # any number of queries; scratch 32 (ceil(nq / 32) (d + dv + 10) + B + 8) + B ceil(dv, 16) floats, 64-byte aligned,
    # where B is the knob `attention_keys`
    Kernel("attention_block32", _BLOCK, partial(_emit_block, vectors=2), "attention"),
    # nq <= 16 queries; the same scratch
    Kernel("attention_block16", _BLOCK, partial(_emit_block, vectors=1), "attention"),
    # one query; scratch ceil(keys, 16) + 16 floats
    Kernel("attention_row", _ROW, _row, "attention_row"),
]
