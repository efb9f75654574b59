"""Attention in one pass: scores, scale, softcap, mask, softmax, values; one head, a block of queries.

Queries lie in the vector lanes. The scores of a block are computed transposed,
S^T[t, s] = sum_d K[t, d] Q^T[d, s], and so are the values, O^T[d, s] = sum_t V[t, d] P^T[t, s]. In both
products the left side is read one scalar at a time from the caller's own rows of K and V, and the right side
is a vector of queries. So K and V are never repacked, the softmax over t is vertical (no maximum or sum
across lanes anywhere), and both products are the same register tile. Only Q on the way in, O on the way out,
and masks that differ between queries are transposed, 16 x 16 floats in registers.

Keys are visited in blocks of `KEY_BLOCK` with a running maximum and sum (online softmax), so that scores
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
from .math import exp, reduce_lanes, tanh, transpose16

KEY_BLOCK = 128
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
    mr: int, nv: int, a: Any, a_rows: list[Any], a_step: Any, b: View, first: int, depth: Any, acc: Any
) -> None:
    """acc[i, :] += sum_k a[a_rows[i] + k a_step] * b[k, first : first + 16 nv]."""
    with for_range(0, depth) as k:
        right = [bind(b.load(k * LANES + first + 16 * j)) for j in range(nv)]
        for i in range(mr):
            left = bind(T.broadcast(load(a, a_rows[i] + k * a_step, 1), 16))
            for j in range(nv):
                index = (i * nv + j) * 16
                store(acc, index, T.fma(left, right[j], load(acc, index)))


def _pack_queries(q: Any, qt: View, q_row: Any, nq: Any, d: Any, scale: Any, nv: int) -> None:
    """qt[dim, lane] = scale * q[lane, dim]; lanes past the last query repeat it."""
    whole = bind(d // 16 * 16)
    for j in range(nv):
        offsets = [bind(tirx.min(_i64(16 * j + lane), nq - 1) * q_row) for lane in range(16)]
        with for_range(0, d // 16) as block:
            rows = [bind(load(q, offset + block * 16)) for offset in offsets]
            for i, column in enumerate(transpose16(rows)):
                qt.store((block * 16 + i) * LANES + 16 * j, column * T.broadcast(scale, 16))
        with for_range(whole, d) as dim:
            for lane, offset in enumerate(offsets):
                qt.store(dim * LANES + 16 * j + lane, load(q, offset + dim, 1) * scale, 1)


def _write_output(o: View, out: Any, out_row: Any, nq: Any, dv: Any, inverse: list[Any], nv: int) -> None:
    """out[lane, dim] = o[dim, lane] * inverse[lane] for the first nq lanes."""
    whole = bind(dv // 16 * 16)
    for j in range(nv):
        with for_range(0, dv // 16) as block:
            columns = [bind(o.load((block * 16 + i) * LANES + 16 * j) * inverse[j]) for i in range(16)]
            for lane, row in enumerate(transpose16(columns)):
                with when(nq > 16 * j + lane):
                    store(out, (16 * j + lane) * out_row + block * 16, row)
        with for_range(whole, dv) as dim:
            o.store(dim * LANES + 16 * j, o.load(dim * LANES + 16 * j) * inverse[j])
            with for_range(_i64(16 * j), tirx.min(nq, _i64(16 * j + 16))) as lane:
                store(out, lane * out_row + dim, o.load(dim * LANES + lane, 1), 1)


def _masked(kind: str, score: Any, mask: Any, lanes: int) -> Any:
    """Add a float mask, or put -inf where a boolean one is False."""
    if kind == "f32":
        return score + mask
    zero = T.uint8(0) if lanes == 1 else T.broadcast(T.uint8(0), lanes)
    return T.Select(mask != zero, score, T.float32(NEG_INF) if lanes == 1 else _vector(NEG_INF, lanes))


def _splat_element(buffer: Any, offset: Any) -> Any:
    return T.broadcast(load(buffer, offset, 1), 16)


def _apply_mask(
    kind: str, mask: Any, p: View, nq: Any, t0: Any, count: Any, mask_s: Any, mask_t: Any, nv: int
) -> None:
    """Mask the scores p[t, lane], t = t0 .. t0 + count."""
    with T.If(mask_s == 0):
        with T.Then(), for_range(0, count) as t:  # one value for all queries: a padding mask
            value = bind(_splat_element(mask, (t0 + t) * mask_t))
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
                    rows = [load(mask, offset + block * 16) for offset in offsets]
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
                        p.store(at, _masked(kind, p.load(at, 1), load(mask, offset + t * mask_t, 1), 1), 1)


def _emit_block(
    isa: Isa,
    q: Any, k: Any, v: Any, mask_f: Any, mask_b: Any, out: Any, scratch: Any,
    nq: Any, q_row: Any, k_row: Any, v_row: Any, out_row: Any, keys: Any, d: Any, dv: Any,
    first_query: Any, causal: Any, mask_kind: Any, mask_s: Any, mask_t: Any, scale: Any, softcap: Any,
    *, vectors: int,
) -> None:  # fmt: skip
    nv = vectors
    wide = isa.registers == 32
    mr = 8 if wide else 6
    halves = [list(range(nv))] if wide else [[j] for j in range(nv)]  # AVX2 has registers for 16 lanes only
    width = len(halves[0])
    qt = View(scratch, _i64(0))
    p = View(scratch, bind(d * LANES))
    o = View(scratch, bind(p.base + (KEY_BLOCK + 8) * LANES))
    running_max = View(scratch, bind(o.base + (dv + 8) * LANES))
    running_sum = View(scratch, bind(running_max.base + LANES))
    acc = registers(mr * width, "float32")
    maxima, sums = registers(nv, "float32"), registers(nv, "float32")

    _pack_queries(q, qt, q_row, nq, d, scale, nv)
    for j in range(nv):
        running_max.store(16 * j, _vector(NEG_INF))
        running_sum.store(16 * j, _vector(0.0))

    with for_range(0, (keys + KEY_BLOCK - 1) // KEY_BLOCK) as key_block:
        t0 = bind(key_block * KEY_BLOCK)
        count = bind(tirx.min(keys - t0, _i64(KEY_BLOCK)))
        with for_range(0, (count + mr - 1) // mr) as tile:
            base = bind(tile * mr)
            rows = [bind((t0 + tirx.min(base + i, count - 1)) * k_row) for i in range(mr)]
            for half in halves:
                for i in range(mr * width):
                    store(acc, i * 16, _vector(0.0))
                _tile(mr, width, k, rows, _i64(1), qt, 16 * half[0], d, acc)
                for i in range(mr):
                    for w, j in enumerate(half):
                        p.store((base + i) * LANES + 16 * j, load(acc, (i * width + w) * 16))

        with when(softcap > T.float32(0.0)), for_range(0, count) as t:
            cap = T.broadcast(softcap, 16)
            for j in range(nv):
                p.store(t * LANES + 16 * j, cap * tanh(p.load(t * LANES + 16 * j) / cap))
        with when(mask_kind == 1):
            _apply_mask("f32", mask_f, p, nq, t0, count, mask_s, mask_t, nv)
        with when(mask_kind == 2):
            _apply_mask("u8", mask_b, p, nq, t0, count, mask_s, mask_t, nv)
        with when(tirx.all(causal != 0, t0 + count - 1 > first_query)), for_range(0, count) as t:
            limit = bind(T.broadcast(T.cast(t0 + t - first_query, "int32"), 16))
            for j in range(nv):
                lanes = T.ramp(T.int32(16 * j), T.int32(1), 16)
                at = t * LANES + 16 * j
                p.store(at, T.Select(limit <= lanes, p.load(at), _vector(NEG_INF)))

        for j in range(nv):
            store(maxima, 16 * j, running_max.load(16 * j))
        with for_range(0, count) as t:
            for j in range(nv):
                store(maxima, 16 * j, tirx.max(load(maxima, 16 * j), p.load(t * LANES + 16 * j)))
        references, corrections = [], []
        for j in range(nv):
            highest = bind(load(maxima, 16 * j))
            # -inf - -inf would be NaN: where nothing was seen so far, subtract 0; each weight is exp(-inf).
            references.append(bind(T.Select(highest == _vector(NEG_INF), _vector(0.0), highest)))
            corrections.append(bind(exp(running_max.load(16 * j) - references[j])))
            running_max.store(16 * j, highest)
            store(sums, 16 * j, running_sum.load(16 * j) * corrections[j])
        with for_range(0, count) as t:
            for j in range(nv):
                weight = bind(exp(p.load(t * LANES + 16 * j) - references[j]))
                p.store(t * LANES + 16 * j, weight)
                store(sums, 16 * j, load(sums, 16 * j) + weight)
        for j in range(nv):
            running_sum.store(16 * j, load(sums, 16 * j))

        with for_range(0, (dv + mr - 1) // mr) as tile:
            base = bind(tile * mr)
            columns = [bind(t0 * v_row + tirx.min(base + i, dv - 1)) for i in range(mr)]
            for half in halves:
                with T.If(key_block == 0):
                    with T.Then():
                        for i in range(mr * width):
                            store(acc, i * 16, _vector(0.0))
                    with T.Else():
                        for i in range(mr):
                            for w, j in enumerate(half):
                                old = o.load((base + i) * LANES + 16 * j)
                                store(acc, (i * width + w) * 16, old * corrections[j])
                _tile(mr, width, v, columns, v_row, p, 16 * half[0], count, acc)
                for i in range(mr):
                    for w, j in enumerate(half):
                        o.store((base + i) * LANES + 16 * j, load(acc, (i * width + w) * 16))

    inverse = []
    for j in range(nv):
        total = bind(running_sum.load(16 * j))
        inverse.append(bind(T.Select(total > _vector(0.0), _vector(1.0) / total, _vector(0.0))))
    with T.If(keys > 0):
        with T.Then():
            _write_output(o, out, out_row, nq, dv, inverse, nv)
        with T.Else(), for_range(0, nq) as s, for_range(0, dv) as dim:
            store(out, s * out_row + dim, T.float32(0.0), 1)


def _row(
    isa: Isa,
    q: Any, k: Any, v: Any, mask_f: Any, mask_b: Any, out: Any, scratch: Any,
    k_row: Any, v_row: Any, keys: Any, d: Any, dv: Any,
    mask_kind: Any, mask_t: Any, scale: Any, softcap: Any,
) -> None:  # fmt: skip
    del isa
    together = 4  # keys whose dot products are in flight at once
    acc = registers(together, "float32")
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
    # nq <= 32 queries; scratch 32 (d + dv + KEY_BLOCK + 24) floats, 64-byte aligned
    Kernel("attention_block32", _BLOCK, partial(_emit_block, vectors=2), "attention"),
    # nq <= 16 queries; same scratch
    Kernel("attention_block16", _BLOCK, partial(_emit_block, vectors=1), "attention"),
    # one query; scratch ceil(keys, 16) + 16 floats
    Kernel("attention_row", _ROW, _row, "attention"),
]
