"""Linears on sparse int4 weights in panels: 16 rows by 4 inputs share a word of the bitmask
(``compiler/dialect/sparse_panels.py``).

Identity: ``t[m, r] = sum_g scale[g, r] sum_(k in g) u[m, k] w[r, k]`` of one panel, or without scales (one a row), which
are then the epilogue's. Few rows of activations (``sparse_panel_gemv_*``, AVX512-VBMI2): the codes of a word become 64
bytes of 16 w (``codes_of`` in sparse_int4.py), which are expanded and meet 4 activations, broadcast, as dense panels do. Zen 5:
an expansion takes both shuffle ports, the mask's way to its register and ``vpmovzxdq`` half of them, which is 2 cycles a
word; 2.2 measured in the cache, and masks and codes lie in the order in which they are read.

More rows (``sparse_panel_decode``): expanded words are the panels of dense int8 tiles, stored as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .dot import vpdpbusd
from .linear import prefetch
from .sparse import expand8
from .sparse_int4 import codes_of, spread_nibbles, zeros
from .sparse_many import VBMI2, counter, popcount, splat

WAYS = {1: 4, 2: 2, 4: 2}
"""Rows of activations of the kernels, and sums of each (a sum waits for the one in front of it)."""

BLOCK = 8
"""Words in a round of the loop: 32 inputs, the smallest group of scales."""

AHEAD, AHEAD_PLACES = 8192, 4096
"""Bytes ahead of what is fetched of codes and of the bitmask. Codes 2 KiB ahead: 35 % slower; 16 KiB: the same."""


def _expanded(mask: Any, word_at: Any, values: Any, at: Any, nothing: Any) -> Any:
    """The next word's codes, times 16, at their 64 places; ``at[0]``, the byte of values, moves on."""
    word, offset = bind(load(mask, word_at, 1)), bind(load(at, 0, 1))
    weights = expand8(codes_of(values, offset), T.reinterpret("uint1x64", word), nothing)
    store(at, 0, offset + ((popcount(word) + T.int64(1)) >> T.int64(1)), 1)
    return weights


def _gemv(rows: int, mode: str, isa: Isa, *arguments: Any) -> None:
    """``t[m, 0..15]`` of a panel and R rows of activations; mode: ``pc``: int32 sums of one group, ``g``: float sums with
    scales of ``groups`` groups of ``group`` inputs, a multiple of 32."""
    x, ldx, mask, values, scale, groups, group, t, ldt, zero = arguments
    if not isa.vnni:
        return  # never called: the driver decodes
    nothing, ways = zeros(zero), WAYS[rows]
    sums, totals = registers(rows * ways, "int32"), registers(rows, "float32")
    at = counter()
    store(at, 0, T.int64(0), 1)
    for m in range(rows):
        store(totals, m * 16, splat(0, "float32", 16))

    def total(m: int) -> Any:
        parts = [load(sums, (m * ways + i) * 16) for i in range(ways)]
        while len(parts) > 1:
            parts = [bind(a + b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    with for_range(0, groups) as g:
        for i in range(rows * ways):
            store(sums, i * 16, splat(0, "int32", 16))
        if mode == "g":
            prefetch(scale, g * 16 + AHEAD_PLACES // 2, 3)
        with for_range(0, group // (4 * BLOCK)) as block:
            first = bind((g * (group // (4 * BLOCK)) + block) * BLOCK)
            prefetch(mask, first + AHEAD_PLACES // 8, 3)
            for i in range(BLOCK):
                if i % 2 == 0:
                    prefetch(values, load(at, 0, 1) + AHEAD, 3)
                weights = _expanded(mask, first + i, values, at, nothing)
                for m in range(rows):
                    four = T.broadcast(load(x, ldx * m + first + i, 1), 16)
                    to = (m * ways + i % ways) * 16
                    store(sums, to, vpdpbusd(load(sums, to), four, weights))
        if mode == "g":
            factor = bind(T.cast(load(scale, g * 16), "float32x16"))
            for m in range(rows):
                products = T.cast(total(m), "float32x16")
                store(totals, m * 16, T.fma(products, factor, load(totals, m * 16)))
    for m in range(rows):
        store(t, ldt * m, total(m) if mode == "pc" else load(totals, m * 16))


def _decode(isa: Isa, *arguments: Any) -> None:
    """``out[c, r, j]``: the codes of inputs 4 c + j of ``words`` words of a panel, times 16 on v4 (dot.py); ``at[0]``, its
    byte in values, moves on."""
    mask, words, values, at, out, zero = arguments
    if not isa.vnni:
        _decode_plain(isa, *arguments)
        return
    nothing, inside = zeros(zero), counter()
    store(inside, 0, load(at, 0, 1), 1)
    with for_range(0, words // BLOCK) as block:
        prefetch(mask, block * BLOCK + AHEAD_PLACES // 8, 3)
        for i in range(BLOCK):
            if i % 2 == 0:
                prefetch(values, load(inside, 0, 1) + AHEAD, 3)
            w = bind(block * BLOCK + i)
            store(out, w * 64, _expanded(mask, w, values, inside, nothing), 64)
    store(at, 0, load(inside, 0, 1), 1)


def _decode_plain(isa: Isa, *arguments: Any) -> None:
    """The same by ``pdep``, 8 codes at a time."""
    mask, words, values, at, out, _ = arguments
    nibbles = counter()
    with for_range(0, words) as w:
        word = bind(load(mask, w, 1))
        store(nibbles, 0, load(at, 0, 1) * 2, 1)
        for part in range(8):
            spread = spread_nibbles(isa, word, part, values, nibbles)
            store(out, w * 64 + part * 8, T.reinterpret("int8x8", spread), 8)
        store(at, 0, (load(nibbles, 0, 1) + T.int64(1)) >> T.int64(1), 1)


def _kernels() -> list[Kernel]:
    kernels = []
    for rows in WAYS:
        for mode, kind in (("pc", "i32"), ("g", "f32")):
            signature = (
                "x: const i32*, ldx: i64, mask: const i64*, values: const u8*, scale: const f16*, groups: i64"
                f", group: i64, t: {kind}*, ldt: i64, zero: i32"
            )
            emit, name = partial(_gemv, rows, mode), f"sparse_panel_gemv_{mode}_{rows}"
            kernels.append(Kernel(name, signature, emit, "sparse_vbmi2", attributes=VBMI2))
    signature = "mask: const i64*, words: i64, values: const u8*, at: i64*, out: i8*, zero: i32"
    kernels.append(Kernel("sparse_panel_decode", signature, _decode, "sparse_vbmi2", attributes=VBMI2))
    kernels.append(Kernel("sparse_panel_decode_plain", signature, _decode_plain, "sparse_many"))
    return kernels


KERNELS = _kernels()
