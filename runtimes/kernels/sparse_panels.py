"""Linears on sparse int4 weights in panels: 16 rows by 4 inputs share a word of the bitmask, two panels the bytes of
their codes (``compiler/dialect/sparse_panels.py``).

Identity: ``t[m, r] = sum_g scale[g, r] sum_(k in g) u[m, k] w[r, k]`` of a pair of panels, or without scales (one a
row), which are then the epilogue's. Few rows of activations (``sparse_panel_gemv_*``, AVX512-VBMI2): the codes of a
word become 64 bytes of 16 w by a mask (and, low nibbles, a shift), are expanded and meet 4 activations, broadcast, as
dense panels do. Of Zen 5's two shuffle ports an expansion takes both for a cycle and the mask's way to its register
one of them, so a word takes 1.5 cycles at least, and 2 for its loads (64 bytes that cross a line, the mask, half an
activation, half a prefetch); 2.5 measured in the second-level cache.

More rows (``sparse_panel_decode``): expanded words are the panels of dense int8 tiles, stored as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .dot import vpdpbusd
from .linear import prefetch
from .sparse import expand8
from .sparse_int4 import pdep, zeros
from .sparse_many import VBMI2, popcount, splat

WAYS = {1: 2, 2: 2, 4: 1}
"""Rows of activations of the kernels, and sums of each and a panel (a sum waits for the one in front of it)."""

BLOCK = 8
"""Words of a panel in a round of the loop: 32 inputs, the smallest group of scales."""

AHEAD = 8192
"""Bytes ahead of what is fetched of codes and of the bitmask. 2 KiB: 35 % slower; 16 KiB: the same."""


def _codes(values: Any, at: Any, half: int) -> Any:
    """The next 64 codes of a panel, times 16, as int8x64."""
    packed = load(values, at, 64)
    if half == 0:
        shifted = T.reinterpret("uint16x32", packed) << splat(4, "uint16", 32)
        packed = T.reinterpret("uint8x64", shifted)
    return T.reinterpret("int8x64", packed & splat(0xF0, "uint8", 64))


def _expanded(mask: Any, word_at: Any, values: Any, at: Any, half: int, nothing: Any) -> Any:
    """The next word's codes at their 64 places; ``at[half]``, the panel's byte of values, moves on."""
    word, offset = bind(load(mask, word_at, 1)), bind(load(at, half, 1))
    weights = expand8(_codes(values, offset, half), T.reinterpret("uint1x64", word), nothing)
    store(at, half, offset + popcount(word), 1)
    return weights


def _starts() -> Any:
    """Bytes of values of two panels, 0."""
    at = registers(2, "int64", 1)
    for half in range(2):
        store(at, half, T.int64(0), 1)
    return at


def _gemv(rows: int, mode: str, isa: Isa, *arguments: Any) -> None:
    """``t[m, 0..31]`` of a pair of panels and R rows of activations; mode: ``pc``: int32 sums of one group, ``g``:
    float sums with scales of ``groups`` groups of ``group`` inputs, a multiple of 32; those of the two panels are
    ``lds`` apart."""
    x, ldx, mask, values, scale, lds, groups, group, t, ldt, zero = arguments
    if not isa.vnni:
        return  # never called: the driver decodes
    nothing, ways = zeros(zero), WAYS[rows]
    sums, totals = registers(2 * rows * ways, "int32"), registers(2 * rows, "float32")
    at = _starts()
    for i in range(2 * rows):
        store(totals, i * 16, splat(0, "float32", 16))

    def total(i: int) -> Any:
        parts = [load(sums, (i * ways + way) * 16) for way in range(ways)]
        return parts[0] if ways == 1 else bind(parts[0] + parts[1])

    with for_range(0, groups) as g:
        for i in range(2 * rows * ways):
            store(sums, i * 16, splat(0, "int32", 16))
        for half in range(2 if mode == "g" else 0):  # of the next pair
            prefetch(scale, lds * (2 + half) + g * 16, 3)
        with for_range(0, group // (4 * BLOCK)) as block:
            first = bind((g * (group // (4 * BLOCK)) + block) * BLOCK)
            for line in range(2):
                prefetch(mask, first * 2 + (AHEAD + 64 * line) // 8, 0)
            for i in range(BLOCK):
                prefetch(values, load(at, 0, 1) + AHEAD, 0)
                both = [_expanded(mask, (first + i) * 2 + h, values, at, h, nothing) for h in range(2)]
                for m in range(rows):
                    four = bind(T.broadcast(load(x, ldx * m + first + i, 1), 16))
                    for half, weights in enumerate(both):
                        to = ((2 * m + half) * ways + i % ways) * 16
                        store(sums, to, vpdpbusd(load(sums, to), four, weights))
        if mode == "g":
            factors = [bind(T.cast(load(scale, lds * half + g * 16), "float32x16")) for half in range(2)]
            for i in range(2 * rows):
                products = T.cast(total(i), "float32x16")
                store(totals, i * 16, T.fma(products, factors[i % 2], load(totals, i * 16)))
    for i in range(2 * rows):
        store(t, ldt * (i // 2) + i % 2 * 16, total(i) if mode == "pc" else load(totals, i * 16))


def _decode(isa: Isa, *arguments: Any) -> None:
    """``out[h, c, r, j]``: the codes of inputs 4 c + j of ``words`` words of each of two panels, times 16 on v4
    (dot.py); ``at[h]``, their bytes in values, move on."""
    mask, words, values, at, out, zero = arguments
    if not isa.vnni:
        _decode_plain(isa, *arguments)
        return
    nothing, inside = zeros(zero), _starts()
    for half in range(2):
        store(inside, half, load(at, half, 1), 1)
    with for_range(0, words // BLOCK) as block:
        for line in range(2):
            prefetch(mask, block * BLOCK * 2 + (AHEAD + 64 * line) // 8, 0)
        for i in range(BLOCK):
            prefetch(values, load(inside, 0, 1) + AHEAD, 0)
            c = bind(block * BLOCK + i)
            for half in range(2):
                weights = _expanded(mask, c * 2 + half, values, inside, half, nothing)
                store(out, (words * half + c) * 64, weights, 64)
    for half in range(2):
        store(at, half, load(inside, half, 1), 1)


def _decode_plain(isa: Isa, *arguments: Any) -> None:
    """The same by ``pdep``, 8 codes at a time."""
    mask, words, values, at, out, _ = arguments
    low = T.int64(0x0F0F0F0F0F0F0F0F)
    with for_range(0, words) as c:
        for half in range(2):
            word = bind(load(mask, c * 2 + half, 1))
            for part in range(8):
                bits = bind((word >> T.int64(8 * part)) & T.int64(255))
                start = bind(load(at, half, 1))
                code = bind((T.reinterpret("int64", load(values, start, 8)) >> T.int64(4 * half)) & low)
                # Times 16 the sign is where it belongs; else it is copied upwards: 8 * 30 = 240.
                code = code << T.int64(4) if isa.vnni else code | ((code & T.int64(0x0808080808080808)) * 30)
                spread = pdep(code, pdep(bits, T.int64(0x0101010101010101)) * 255)
                store(out, (words * half + c) * 64 + part * 8, T.reinterpret("int8x8", bind(spread)), 8)
                store(at, half, start + popcount(bits), 1)


def _kernels() -> list[Kernel]:
    kernels = []
    for rows in WAYS:
        for mode, kind in (("pc", "i32"), ("g", "f32")):
            signature = (
                "x: const i32*, ldx: i64, mask: const i64*, values: const u8*, scale: const f16*, lds: i64"
                f", groups: i64, group: i64, t: {kind}*, ldt: i64, zero: i32"
            )
            emit, name = partial(_gemv, rows, mode), f"sparse_panel_gemv_{mode}_{rows}"
            kernels.append(Kernel(name, signature, emit, "sparse_vbmi2", attributes=VBMI2))
    signature = "mask: const i64*, words: i64, values: const u8*, at: i64*, out: i8*, zero: i32"
    kernels.append(Kernel("sparse_panel_decode", signature, _decode, "sparse_vbmi2", attributes=VBMI2))
    kernels.append(Kernel("sparse_panel_decode_plain", signature, _decode_plain, "sparse_many"))
    return kernels


KERNELS = _kernels()
