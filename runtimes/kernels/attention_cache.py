"""Attention on packed codes of keys and values (``compiler/dialect/cache_packing.py``): one query of R heads, or many.

Identity: ``q . k_t = s_t (sum_d q_d u_td - z_t sum_d q_d)`` and ``sum_t p_t v_t = sum_t (p_t s_t) u_t - sum_t p_t s_t
z_t``, so codes meet floats as they are: a conversion and a multiply-add for 16 of them, and the pairs cost one
operation a token.

* R heads (4, 2 or 1) that share their keys are worked on together: each code is converted once for all of them.
* Scores: lanes run along the head, 16 tokens at a time, whose 16 vectors of partial sums are transposed and added, so
  that a sum across lanes costs 5 operations and not 12.
* Values: blocks of 128 tokens (their codes stay in the first-level cache), 32 dimensions of the head at a time in
  registers.
* Groups inside a head have pairs of their own: a head is then several short ones whose scores are added. Weights
  ``p s`` of a block of tokens are made for one group after the other, so the loops over codes do not know of groups.

Many queries (prefill) are compute, not memory: the block kernel of attention.py, which brings keys and values of a
block of tokens to floats in scratch memory when it comes to them (``attention_block*_cache*``). A code then is 4 bytes
for as long as it is used, in the second-level cache, and never in memory. Scratch: see KERNELS.

Scratch of few queries of R heads with Gk and Gv groups: R (ceil(keys, 16) + Dp + Dvp + 384 + 16 Gv + Gk)
floats, 64-byte aligned.
"""

from __future__ import annotations

from functools import partial
from operator import add
from typing import Any

from tvm import tirx

from .attention import Block, View, _masked
from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .math import exp, reduce_lanes, tanh, transpose16

HEADS = (4, 2, 1)
"""Heads of one query that a kernel takes."""
TOKENS = 128
"""Tokens of a block of values, and of keys where there are many queries."""
NEG_INF = float("-inf")


def _vector(value: float) -> Any:
    return T.broadcast(T.float32(value), 16)


def _codes(bits: int, buffer: Any, at: Any) -> tuple[Any, Any]:
    """32 dimensions of a token at byte ``at``, as two vectors of floats."""
    if bits == 8:
        return tuple(bind(T.cast(load(buffer, at + 16 * i), "float32x16")) for i in range(2))
    words = bind(T.cast(load(buffer, at), "int32x16"))
    low, high = words & T.broadcast(T.int32(15), 16), words >> T.broadcast(T.int32(4), 16)
    return bind(T.cast(low, "float32x16")), bind(T.cast(high, "float32x16"))


def _pairs(params: Any, tokens: list[Any], groups: Any, group: Any) -> tuple[Any, Any]:
    """Scales and zero points of a group of 16 tokens."""
    lanes = [tirx.const(i, "int32") for i in range(16)]
    both = [[load(params, (token * groups + group) * 2 + which, 1) for token in tokens] for which in range(2)]
    scales, zeros = (bind(tirx.Shuffle(scalars, lanes)) for scalars in both)
    return scales, zeros


def _attention(bits: int, heads: int, isa: Isa, *arguments: Any) -> None:
    """out[r, :] for R heads of one query; rows of q, out and masks are their strides apart."""
    del isa
    (q, k, k_params, v, v_params, mask_f, mask_b, out, scratch, q_head, out_head, keys, d, dv,
     k_group, v_group, mask_kind, mask_head, mask_t, scale, softcap) = arguments  # fmt: skip
    dp, dvp = bind((d + 31) // 32 * 32), bind((dv + 31) // 32 * 32)
    per_byte = 8 // bits
    k_row, v_row = bind(dp // per_byte), bind(dvp // per_byte)
    k_groups, v_groups = bind((dp + k_group - 1) // k_group), bind((dvp + v_group - 1) // v_group)
    padded = bind((keys + 15) // 16 * 16)
    queries = bind(
        padded * heads
    )  # offsets in scratch: scores [R, padded], q [R, dp], o [R, dvp], sums [R, 16, 16], weights [R, TOKENS],
    # offsets [R, Gv, 16], sizes [R, Gk]
    outputs = bind(queries + dp * heads)
    sums = bind(outputs + dvp * heads)
    weights = bind(sums + 256 * heads)
    offsets = bind(weights + TOKENS * heads)
    sizes = bind(offsets + v_groups * (16 * heads))

    total = registers(1, "float32")
    for r in range(heads):
        with for_range(0, dp // 16) as i:
            store(scratch, queries + dp * r + i * 16, _vector(0.0))
        with for_range(0, d) as i:
            store(scratch, queries + dp * r + i, load(q, q_head * r + i, 1) * scale, 1)
        with for_range(0, k_groups) as g:
            store(total, 0, _vector(0.0))
            with for_range(g * k_group // 16, tirx.min((g + 1) * k_group, dp) // 16) as i:
                store(total, 0, load(total, 0) + load(scratch, queries + dp * r + i * 16))
            store(scratch, sizes + k_groups * r + g, reduce_lanes(load(total, 0), add), 1)

    _scores(
        bits, heads, k, k_params, scratch, keys, padded, k_row, queries, dp, sums, sizes, k_group, k_groups
    )
    inverses = registers(heads, "float32")
    for r in range(heads):
        _softmax(r, bind(padded * r), mask_f, mask_b, scratch, keys, padded, mask_kind, mask_head, mask_t, softcap,
                 inverses)  # fmt: skip
    _values(
        bits,
        heads,
        v,
        v_params,
        scratch,
        keys,
        padded,
        v_row,
        outputs,
        dvp,
        weights,
        offsets,
        v_group,
        v_groups,
    )
    for r in range(heads):
        with for_range(0, dv // 16) as i:
            offset = load(scratch, offsets + (v_groups * r + i * 16 // v_group) * 16)
            value = load(scratch, outputs + dvp * r + i * 16) - offset
            store(out, out_head * r + i * 16, value * load(inverses, r * 16))
        with for_range(dv // 16 * 16, dv) as i:
            offset = load(scratch, offsets + (v_groups * r + i // v_group) * 16, 1)
            value = load(scratch, outputs + dvp * r + i, 1) - offset
            store(out, out_head * r + i, value * load(inverses, r * 16, 1), 1)


def _scores(
    bits: int, heads: int, k: Any, params: Any, scratch: Any, keys: Any, padded: Any, row: Any, queries: Any,
    dp: Any, sums: Any, sizes: Any, group: Any, groups: Any,
) -> None:  # fmt: skip
    together = 4 // heads  # tokens in flight: 8 chains of multiply-adds with their two halves
    acc = registers(2 * together * heads, "float32")
    scores = registers(heads, "float32")
    with for_range(0, padded // 16) as block:
        tokens = [bind(tirx.min(block * 16 + i, keys - 1)) for i in range(16)]
        for r in range(heads):
            store(scores, r * 16, _vector(0.0))
        with for_range(0, groups) as g:
            begin, end = bind(g * group // 32), bind(tirx.min((g + 1) * group, dp) // 32)
            for first in range(0, 16, together):
                for i in range(2 * together * heads):
                    store(acc, i * 16, _vector(0.0))
                starts = [bind(tokens[first + i] * row) for i in range(together)]
                with for_range(begin, end) as chunk:
                    parts = [
                        [bind(load(scratch, queries + dp * r + chunk * 32 + 16 * h)) for h in range(2)]
                        for r in range(heads)
                    ]
                    for i, start in enumerate(starts):
                        codes = _codes(bits, k, start + chunk * (32 * bits // 8))
                        for r in range(heads):
                            for h in range(2):
                                index = ((i * heads + r) * 2 + h) * 16
                                store(acc, index, T.fma(parts[r][h], codes[h], load(acc, index)))
                for i in range(together):
                    for r in range(heads):
                        index = (i * heads + r) * 32
                        whole = load(acc, index) + load(acc, index + 16)
                        store(scratch, sums + (r * 16 + first + i) * 16, whole)
            scales, zeros = _pairs(params, tokens, groups, g)
            for r in range(heads):
                columns = transpose16([bind(load(scratch, sums + (r * 16 + i) * 16)) for i in range(16)])
                while len(columns) > 1:
                    columns = [bind(a + b) for a, b in zip(columns[::2], columns[1::2], strict=True)]
                size = T.broadcast(load(scratch, sizes + groups * r + g, 1), 16)
                store(scores, r * 16, load(scores, r * 16) + scales * (columns[0] - zeros * size))
        for r in range(heads):
            store(scratch, padded * r + block * 16, load(scores, r * 16))


def _softmax(
    r: int, at: Any, mask_f: Any, mask_b: Any, scratch: Any, keys: Any, padded: Any, mask_kind: Any,
    mask_head: Any, mask_t: Any, softcap: Any, inverses: Any,
) -> None:  # fmt: skip
    """Scores of one head to p, with 1 / sum p."""
    highest, total = (registers(1, "float32") for _ in range(2))
    with when(softcap > T.float32(0.0)), for_range(0, padded // 16) as block:
        cap = T.broadcast(softcap, 16)
        store(scratch, at + block * 16, cap * tanh(load(scratch, at + block * 16) / cap))
    for code, kind, mask in ((1, "f32", mask_f), (2, "u8", mask_b)):
        with when(mask_kind == code):
            vectors = bind(T.Select(mask_t == 1, keys // 16, tirx.const(0, "int64")))
            with for_range(0, vectors) as block:
                held = load(mask, mask_head * r + block * 16)
                store(scratch, at + block * 16, _masked(kind, load(scratch, at + block * 16), held, 16))
            with for_range(vectors * 16, keys) as t:
                held = load(mask, mask_head * r + t * mask_t, 1)
                store(scratch, at + t, _masked(kind, load(scratch, at + t, 1), held, 1), 1)
    with for_range(keys, padded) as t:
        store(scratch, at + t, T.float32(NEG_INF), 1)
    store(highest, 0, _vector(NEG_INF))
    with for_range(0, padded // 16) as block:
        store(highest, 0, tirx.max(load(highest, 0), load(scratch, at + block * 16)))
    top = bind(reduce_lanes(load(highest, 0), tirx.max))
    # -inf - -inf would be NaN: where nothing is seen, subtract 0.
    reference = bind(T.broadcast(T.Select(top == T.float32(NEG_INF), T.float32(0.0), top), 16))
    store(total, 0, _vector(0.0))
    with for_range(0, padded // 16) as block:
        weight = bind(exp(load(scratch, at + block * 16) - reference))
        store(total, 0, load(total, 0) + weight)
        store(scratch, at + block * 16, weight)
    sum_ = bind(reduce_lanes(load(total, 0), add))
    inverse = T.Select(sum_ > T.float32(0.0), T.float32(1.0) / sum_, T.float32(0.0))
    store(inverses, r * 16, T.broadcast(inverse, 16))


def _values(
    bits: int, heads: int, v: Any, params: Any, scratch: Any, keys: Any, padded: Any, row: Any, outputs: Any,
    dvp: Any, weights: Any, offsets: Any, group: Any, groups: Any,
) -> None:  # fmt: skip
    """o[r, :] = sum_t p[r, t] s[t] u[t, :], and sum_t p s z of every group."""
    ways = 4 // heads  # chains of multiply-adds for each vector
    acc = registers(2 * heads * ways, "float32")
    for r in range(heads):
        with for_range(0, dvp // 16) as i:
            store(scratch, outputs + dvp * r + i * 16, _vector(0.0))
    with for_range(0, groups * heads) as i:
        store(scratch, offsets + i * 16, _vector(0.0))
    with for_range(0, (keys + TOKENS - 1) // TOKENS) as block:
        first = bind(block * TOKENS)
        count = bind(tirx.min(keys - first, tirx.const(TOKENS, "int64")))
        with for_range(0, groups) as g:
            with for_range(0, (count + 15) // 16) as i:
                tokens = [bind(tirx.min(first + i * 16 + j, keys - 1)) for j in range(16)]
                scales, zeros = _pairs(params, tokens, groups, g)
                for r in range(heads):
                    scaled = bind(load(scratch, padded * r + first + i * 16) * scales)
                    store(scratch, weights + TOKENS * r + i * 16, scaled)
                    at = bind(offsets + (groups * r + g) * 16)
                    store(scratch, at, T.fma(scaled, zeros, load(scratch, at)))
            with for_range(g * group // 32, tirx.min((g + 1) * group, dvp) // 32) as chunk:
                for i in range(2 * heads * ways):
                    store(acc, i * 16, _vector(0.0))

                def step(t: Any, way: int, chunk: Any = chunk, first: Any = first) -> None:
                    codes = _codes(bits, v, (first + t) * row + chunk * (32 * bits // 8))
                    for r in range(heads):
                        weight = bind(T.broadcast(load(scratch, weights + TOKENS * r + t, 1), 16))
                        for h in range(2):
                            index = ((way * heads + r) * 2 + h) * 16
                            store(acc, index, T.fma(weight, codes[h], load(acc, index)))

                with for_range(0, count // ways) as i:
                    for way in range(ways):
                        step(bind(i * ways + way), way)
                with for_range(count // ways * ways, count) as t:
                    step(bind(t), 0)
                for r in range(heads):
                    for h in range(2):
                        whole = [load(acc, ((way * heads + r) * 2 + h) * 16) for way in range(ways)]
                        while len(whole) > 1:
                            whole = [a + b for a, b in zip(whole[::2], whole[1::2], strict=True)]
                        at = outputs + dvp * r + chunk * 32 + 16 * h
                        store(scratch, at, load(scratch, at) + whole[0])
    with for_range(0, groups * heads) as i:
        sum_ = reduce_lanes(load(scratch, offsets + i * 16), add)
        store(scratch, offsets + i * 16, T.broadcast(sum_, 16))


def _expand(bits: int, codes: Any, params: Any, at: Any, out: View, count: Any, width: Any) -> None:
    """out[t, 0:width] = s (u - z) for ``count`` heads, or groups of them, from the at-th on."""
    with for_range(0, count) as t:
        scale = bind(T.broadcast(load(params, (at + t) * 2, 1), 16))
        zero = bind(T.broadcast(load(params, (at + t) * 2 + 1, 1), 16))
        start = bind((at + t) * (width * bits // 8))
        with for_range(0, width // 32) as chunk:
            for h, u in enumerate(_codes(bits, codes, start + chunk * (32 * bits // 8))):
                out.store(t * width + chunk * 32 + 16 * h, scale * (u - zero))


class _CodedBlock(Block):
    """The block kernel on codes: a group with a pair of its own is, to `_expand`, a token of its own."""

    def __init__(self, bits: int, *rest: Any) -> None:
        self.bits = bits
        super().__init__(*rest)

    def start(self, *keys_and_values: Any) -> Any:
        self.k, self.k_params, self.v, self.v_params, self.k_group, self.v_group = keys_and_values
        self.k_width, self.v_width = (bind((n + 31) // 32 * 32) for n in (self.d, self.dv))
        self.v_copy = View(self.scratch, self.copies)
        self.k_copy = View(self.scratch, bind(self.copies + self.v_width * self.key_block))
        return self.k_width + self.v_width

    def fetch(self, t0: Any) -> None:
        count = bind(tirx.min(self.keys - t0, tirx.const(self.key_block, "int64")))
        for codes, params, group, width, copy in (
            (self.k, self.k_params, self.k_group, self.k_width, self.k_copy),
            (self.v, self.v_params, self.v_group, self.v_width, self.v_copy),
        ):
            groups = bind(width // group)
            _expand(self.bits, codes, params, t0 * groups, copy, count * groups, group)

    def key_rows(self, t0: Any, tokens: list[Any]) -> tuple[View, list[Any]]:
        return self.k_copy, [bind(token * self.k_width) for token in tokens]

    def values(self, t0: Any, keys: Any, corrections: list[Any]) -> None:
        self.values_of(self.v_copy, self.v_width, t0, keys, corrections)


def _block(
    bits: int, vectors: int, isa: Isa, q: Any, k: Any, k_params: Any, v: Any, v_params: Any, mask_f: Any,
    mask_b: Any, out: Any, scratch: Any, k_group: Any, v_group: Any, *others: Any,
) -> None:  # fmt: skip
    shared = (q, mask_f, mask_b, out, scratch, *others)
    _CodedBlock(bits, isa, vectors, TOKENS, (k, k_params, v, v_params, k_group, v_group), shared).emit()


def _pack(isa: Isa, *arguments: Any) -> None:
    """Codes [rows, dp], a byte each, to two a byte."""
    del isa
    u, packed, blocks = arguments
    with for_range(0, blocks) as i:
        high = load(u, i * 32 + 16) << T.broadcast(T.uint8(4), 16)
        store(packed, i * 16, load(u, i * 32) | high)


_POINTERS = (
    "q: const f32*, k: const u8*, k_params: const f32*, v: const u8*, v_params: const f32*, mask_f: const f32*, "
    "mask_b: const u8*, out: f32*, scratch: f32*"
)
_SIZES = (
    "q_head: i64, out_head: i64, keys: i64, d: i64, dv: i64, k_group: i64, v_group: i64, mask_kind: i64, "
    "mask_head: i64, mask_t: i64, scale: f32, softcap: f32"
)
_BLOCK_SIZES = (
    "k_group: i64, v_group: i64, nq: i64, q_row: i64, out_row: i64, keys: i64, d: i64, dv: i64, first_query: i64, "
    "causal: i64, mask_kind: i64, mask_s: i64, mask_t: i64, scale: f32, softcap: f32"
)

KERNELS = [
    *(
        Kernel(
            f"attention_cache{bits}_{heads}",
            f"{_POINTERS}, {_SIZES}",
            partial(_attention, bits, heads),
            "attention_cache",
        )
        for bits in (8, 4)
        for heads in HEADS
    ),
    # any number of queries (16: up to so many); scratch 32 (ceil(nq / 32) (d + dv + 10) + TOKENS + 8)
    # + TOKENS (Dp + Dvp) floats, 64-byte aligned
    *(
        Kernel(
            f"attention_block{16 * vectors}_cache{bits}",
            f"{_POINTERS}, {_BLOCK_SIZES}",
            partial(_block, bits, vectors),
            "attention_cache",
        )
        for bits in (8, 4)
        for vectors in (2, 1)
    ),
    Kernel("cache_pack", "u: const u8*, packed: u8*, blocks: i64", _pack, "attention_cache"),
]
