"""One row of activations against 8-bit codebooks: products are looked up in registers, not made (AVX512-VBMI).

Identity: with ``T_m[g, c] = sum_j x[8 g + j] C_m[c, j]``, ``y[n] = scale[n] sum_g sum_m T_m[g, code[n, g, m]]``. Codes:
compiler/dialect/packing_codebook.py; for one codebook or two (1x8, 2x8).

* ``codebook_tables{M}`` makes the 256 entries of T for each code of a row, in fixed point of 21 bits:
  ``round(factor T) + 2^20``, as three planes of 7 bits in bytes. A block of 32 codes has one factor, from a bound of
  all its entries (`codebook_driver.h`), so that one large activation spoils no other block. Where one group's sum of
  absolute activations is more than a quarter of all, and eight times the mean of the groups', the driver refuses.
* ``codebook_lookup{M}``: the codes of 64 rows are one vector of indices, and two ``vpermi2b`` on half a plane each look
  up 64 bytes; those of two codes have room for their sum. Bytes are summed in 16-bit lanes: words as they are, and
  their high bytes; the low ones follow from both, modulo 2^16. Once a block the three planes become floats.

The tables of a block, 24 KiB, stay in the first-level cache while all panels go by, 512 bytes of each. (Tables of all
of K come from the second-level cache instead, 384 bytes for 64 codes: that took twice the time.)

Operations of 512 bits for 64 codes: 6 ``vpermi2b``, 3 blends and a mask, 1.5 sums of bytes, 4.5 to words, 2 that turn
panels to indices: 18, and 0.6 for floats. Zen 5 starts four a cycle, two of them permutations, masks or insertions (9
here): 4.7 cycles for 64 bytes; 6.1 are measured, and 6.6 with the beginning and end of a block. Making tables is 256
multiply-adds of 16 lanes for each group and two codebooks, a fixed price (22 us for K = 4096 there), so few output
features stay with codebook.py. The driver makes and uses tables 384 KiB at a time, half of a second-level cache.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .linear import prefetch
from .math import shuffle, transpose16
from .sparse_many import VBMI2

GROUP = 8
PLANES = 3
BITS = 7
"""Of an entry in each plane, so that the bytes of two lookups have room for their sum."""
PANELS = 8
"""Panels that are looked up together, so that a table is loaded once for all."""
SETS = PANELS // 4
"""Vectors of 64 rows."""
CODES = 32
"""Of a row in a block: the tables of a block stay in the first-level cache while all panels use them."""
LINE = 4
"""Codes of a row in 64 bytes of a panel, for one codebook and for two."""
NEAR = 2
"""Lines of a panel ahead that are fetched from the second-level cache, where those of later panels come (``ahead``)."""
OFFSET = 1 << (PLANES * BITS - 1)
"""What makes an entry positive."""


def _splat(value: int, dtype: str, lanes: int) -> Any:
    return T.broadcast(tirx.const(value, dtype), lanes)


def _turn(isa: Isa, stored: Any, count: Any, out: Any) -> None:
    """``count`` codebooks of float16 [256, 8] to float32 [8, 256], with entry 4 l + q of 64 at place 16 q + l."""
    del isa
    with for_range(0, count * 4) as part, for_range(0, 2) as half:
        at = [part * 512 + half * 16 + 32 * lane for lane in range(16)]
        columns = transpose16([bind(T.cast(load(stored, place), "float32x16")) for place in at])
        for i, column in enumerate(columns):
            book, inside = part // 4 * 2048, part % 4 * 64
            store(out, book + i % GROUP * 256 + inside + half * 32 + i // GROUP * 16, column)


def _planes(fixed: list[Any]) -> list[Any]:
    """64 numbers of 21 bits, number 4 l + q in lane l of vector q, as three vectors of their 7-bit fields in order."""
    shifts = [BITS * plane + 32 * half for half in range(2) for plane in (*range(PLANES), 0)]
    control = tirx.const(int.from_bytes(bytes(shifts), "little"), "int64")
    spread = [
        bind(
            T.call_llvm_pure_intrin(
                "uint8x64",
                "llvm.x86.avx512.pmultishift.qb.512",
                T.reinterpret("uint8x64", T.broadcast(control, 8)),
                T.reinterpret("uint8x64", number),
            )
            & _splat((1 << BITS) - 1, "uint8", 64)
        )
        for number in fixed
    ]
    # Fields of two vectors side by side, then of four.
    both, last = (
        [
            bind(
                shuffle(
                    a,
                    b,
                    [4 * lane + plane + 64 * i for plane in planes for lane in range(16) for i in range(2)],
                )
            )
            for a, b in (spread[:2], spread[2:])
        ]
        for planes in ((0, 1), (2, 2))
    )
    order = [2 * lane + i + 64 * half for lane in range(16) for half in range(2) for i in range(2)]
    return [
        shuffle(both[0], both[1], order),
        shuffle(both[0], both[1], [32 + i for i in order]),
        shuffle(last[0], last[1], order),
    ]


def _tables(books: int, isa: Isa, *arguments: Any) -> None:
    """Planes [code, plane, 256] of the codes of groups begin..end, an even number; x has 8 activations for each group,
    ``factors`` one number for each block of codes, and ``turned`` is what `_turn` wrote."""
    if not isa.vnni:
        return  # nothing calls it
    x, turned, factors, begin, end, out = arguments
    magic = T.broadcast(T.float32(1.5 * 2**23 + OFFSET), 16)
    with for_range(begin // 2, end // 2) as pair:
        factor = bind(load(factors, pair * 2 // (CODES // books), 1))
        inputs = [
            [bind(T.broadcast(load(x, (pair * 2 + g) * GROUP + j, 1) * factor, 16)) for j in range(GROUP)]
            for g in range(2)
        ]
        for m in range(books):
            with for_range(0, 4) as part:
                totals: dict[tuple[int, int], Any] = {}
                for j, q in product(range(GROUP), range(4)):
                    entries = bind(load(turned, (m * GROUP + j) * 256 + part * 64 + q * 16))
                    for g in range(2):
                        each = inputs[g][j]
                        totals[g, q] = bind(T.fma(each, entries, totals[g, q]) if j else each * entries)
                for g in range(2):
                    numbers = [bind(T.reinterpret("uint32x16", totals[g, q] + magic)) for q in range(4)]
                    code = (pair * 2 + g) * books + m
                    for plane, values in enumerate(_planes(numbers)):
                        prefetch(out, ((code + 4 * books) * PLANES + plane) * 256 + part * 64, 3)
                        store(out, (code * PLANES + plane) * 256 + part * 64, values, 64)


def _blocks(a: Any, b: Any, which: list[int]) -> Any:
    """A vector of 64 bytes of four 16-byte blocks of a (0-3) and b (4-7)."""
    first, second = (T.reinterpret("int64x8", v) for v in (a, b))
    lanes = [2 * block + half for block in which for half in range(2)]
    return T.reinterpret("uint8x64", shuffle(first, second, lanes))


def _indices(books: int, lines: list[Any]) -> list[Any]:
    """The codes of one line of each of four panels, in their order, as indices of 64 rows.

    Two codebooks: even bytes are the first two panels, odd ones the others. One: rows in their order.
    """
    if books == 1:
        first = [bind(_blocks(lines[0], lines[1], [i, i + 1, 4 + i, 5 + i])) for i in (0, 2)]
        second = [bind(_blocks(lines[2], lines[3], [i, i + 1, 4 + i, 5 + i])) for i in (0, 2)]
        return [
            bind(_blocks(first[g // 2], second[g // 2], [g % 2, 2 + g % 2, 4 + g % 2, 6 + g % 2]))
            for g in range(4)
        ]
    low, eight = _splat(0x00FF, "uint16", 32), _splat(8, "uint16", 32)
    high = _splat(0xFF00, "uint16", 32)
    found = []
    for g in range(2):
        a, b = (
            bind(T.reinterpret("uint16x32", _blocks(x, y, [2 * g, 2 * g + 1, 4 + 2 * g, 5 + 2 * g])))
            for x, y in (lines[:2], lines[2:])
        )
        both = ((a & low) | (b << eight), (a >> eight) | (b & high))
        found += [bind(T.reinterpret("uint8x64", words)) for words in both]
    return found


def _look_up(table: list[Any], index: Any, upper: Any) -> Any:
    """256 bytes in four vectors at 64 indices; ``upper``: which of them are above 127."""
    low, high = (
        T.call_llvm_pure_intrin(
            "uint8x64", "llvm.x86.avx512.vpermi2var.qi.512", table[i], index, table[i + 1]
        )
        for i in (0, 2)
    )
    return T.Select(upper, high, low)


def _interleave(a: Any, b: Any, high: bool) -> Any:
    """The low or high four words of each 16 bytes of a and b in turn, as pairs for `_pairs`."""
    lanes = [
        8 * block + 4 * high + i + 32 * half for block in range(4) for i in range(4) for half in range(2)
    ]
    return T.reinterpret("int16x32", shuffle(a, b, lanes))


def _pairs(total: Any, words: Any, low: int, high: int) -> Any:
    """``total`` plus the first word of each pair times ``low`` and the second times ``high``."""
    factors = T.reinterpret("int16x32", T.broadcast(tirx.const(low + (high << 16), "int32"), 16))
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpwssd.512", total, words, factors)


def _lookup(books: int, isa: Isa, *arguments: Any) -> None:
    """sums[0:128] += sums over a block of 8 panels, ``stride`` bytes apart; of fewer ``panels`` of the last one again.

    Sums of 32 rows come in the order of `_interleave`; of one codebook first even rows of 64, then odd ones. Asks for
    what lies ``ahead`` bytes behind.
    """
    if not isa.vnni:
        return  # nothing calls it
    w, stride, panels, tables, lines, ahead, inverse, sums = arguments
    words, highs = (registers(PLANES * SETS, "uint16", 32) for _ in range(2))
    starts = [bind(tirx.min(tirx.const(i, "int64"), panels - 1) * stride) for i in range(PANELS)]
    eight = _splat(8, "uint16", 32)
    # Every entry has OFFSET too much, a power of two in the last plane.
    offset = bind(T.cast(0 - lines * (LINE * OFFSET >> BITS * (PLANES - 1)), "uint16"))
    for plane, s in product(range(PLANES), range(SETS)):
        last, at = plane == PLANES - 1, (plane * SETS + s) * 32
        store(
            words,
            at,
            T.broadcast(offset * tirx.const(257, "uint16"), 32) if last else _splat(0, "uint16", 32),
            32,
        )
        store(highs, at, T.broadcast(offset, 32) if last else _splat(0, "uint16", 32), 32)
    with for_range(0, lines) as line:
        indices = []
        inside = line + NEAR < lines
        near = bind(64 * NEAR + T.Select(inside, T.int64(0), PANELS * stride - lines * 64))
        for s in range(SETS):
            loaded = []
            for i in range(4):
                at = bind(starts[4 * s + i] + line * 64)
                prefetch(w, at + ahead, 2)
                prefetch(w, at + near, 3)
                loaded.append(bind(load(w, at, 64)))
            indices.append(_indices(books, loaded))
        for pair in range(LINE // 2):
            codes = (2 * pair, 2 * pair + 1)
            for plane in range(PLANES):
                found: list[Any] = [None] * SETS
                for i in codes:
                    start = bind(((line * LINE + i) * PLANES + plane) * 256)
                    table = [bind(load(tables, start + 64 * j, 64)) for j in range(4)]
                    for s in range(SETS):
                        upper = T.reinterpret("int8x64", indices[s][i]) < _splat(0, "int8", 64)
                        one = _look_up(table, indices[s][i], upper)
                        found[s] = bind(one if found[s] is None else found[s] + one)
                for s in range(SETS):
                    both = bind(T.reinterpret("uint16x32", found[s]))
                    at = (plane * SETS + s) * 32
                    store(words, at, load(words, at, 32) + both, 32)
                    store(highs, at, load(highs, at, 32) + (both >> eight), 32)
    factor, none = bind(T.broadcast(inverse, 16)), _splat(0, "uint16", 32)
    for s in range(SETS):
        odd = [bind(load(highs, (plane * SETS + s) * 32, 32)) for plane in range(PLANES)]
        even = [
            bind(load(words, (plane * SETS + s) * 32, 32) - (odd[plane] << eight)) for plane in range(PLANES)
        ]
        for half, (first, second, third) in enumerate((even, odd)):
            for part in range(2):
                total = _pairs(_splat(0, "int32", 16), _interleave(first, second, bool(part)), 1, 1 << BITS)
                total = _pairs(total, _interleave(third, none, bool(part)), 1 << 2 * BITS, 0)
                at = s * 64 + half * 32 + part * 16
                store(sums, at, T.fma(T.cast(total, "float32x16"), factor, load(sums, at)))


KERNELS = [
    Kernel("codebook_turn", "stored: const f16*, count: i64, out: f32*", _turn, "codebook"),
    *(
        Kernel(
            f"codebook_tables{books}",
            "x: const f32*, turned: const f32*, factors: const f32*, begin: i64, end: i64, out: u8*",
            partial(_tables, books),
            "codebook_vbmi",
            attributes=VBMI2,
        )
        for books in (1, 2)
    ),
    *(
        Kernel(
            f"codebook_lookup{books}",
            "w: const u8*, stride: i64, panels: i64, tables: const u8*, lines: i64, ahead: i64, inverse: f32, "
            "sums: f32*",
            partial(_lookup, books),
            "codebook_vbmi",
            attributes=VBMI2,
        )
        for books in (1, 2)
    ),
]
