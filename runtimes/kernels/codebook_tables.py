"""One row of activations against 8-bit codebooks: products are looked up in registers, not made (AVX512-VBMI).

Identity: with ``T_m[g, c] = sum_j x[8 g + j] C_m[c, j]``, ``y[n] = scale[n] sum_g sum_m T_m[g, code[n, g, m]]``. Codes:
compiler/dialect/packing_codebook.py; for one codebook or two (1x8, 2x8).

* ``codebook_tables`` makes the 256 entries of T for each group and codebook, in fixed point of 24 bits:
  ``floor(factor T + 1/2) + 2^23``, as three planes of bytes. The factor is from a bound of all entries
  (`codebook_driver.h`), so a sum over K = 4096 is off by some 1e-8 of the sum of absolute values, as float32 is; with
  one activation up to 500 times the others, 4e-6 were measured. Where a group's sum of absolute activations is more
  than 256 times the mean of the groups', the driver refuses.
* ``codebook_lookup{M}``: the codes of 64 rows are one vector of indices, and two ``vpermi2b`` on half a plane each look
  up 64 bytes. Bytes are summed in 16-bit lanes: words as they are, and their high bytes; the low ones follow from both,
  modulo 2^16, while at most 256 bytes are summed. Then sums go to int32.

Operations for 64 rows and 8 weights of each (2x8, 128 bytes of codes): 12 ``vpermi2b``, 2 shuffles and 6 others that
turn panels to indices, 18 shifts and additions, 2 masks: 40 of 512 bits, 0.08 a weight, where fetching vectors
(codebook.py) takes 0.9. The tables of 8 weights are 1.5 KiB for all rows of a task, from the second-level cache. Making
them is 256 multiply-adds of 16 lanes for each group, as much as 250 rows of lookups, so few output features stay with
codebook.py. The driver makes and uses tables 384 KiB at a time, half of a second-level cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .linear import prefetch
from .math import shuffle
from .sparse_many import VBMI2

GROUP = 8
PLANES = 3
PANELS = 16
"""Panels that are looked up together, so that a table is loaded once for all."""
SETS = PANELS // 4
"""Vectors of 64 rows."""
AHEAD = 2048
"""Bytes ahead that each of the panels is fetched, for use once."""
FLUSH = 256
"""Bytes that a 16-bit lane may sum up."""


def _splat(value: int, dtype: str, lanes: int) -> Any:
    return T.broadcast(tirx.const(value, dtype), lanes)


def _turn(isa: Isa, stored: Any, count: Any, out: Any) -> None:
    """Codebooks of float16 [256, 8], ``count`` of them, to float32 [8, 256]."""
    del isa
    with for_range(0, count * 16) as i:
        pairs = [bind(load(stored, i * 128 + 16 * j)) for j in range(8)]
        for j in range(GROUP):
            vectors = [
                shuffle(a, b, [j, j + 8, j + 16, j + 24])
                for a, b in zip(pairs[::2], pairs[1::2], strict=True)
            ]
            lanes = [tirx.const(n, "int32") for n in range(16)]
            column = bind(T.cast(tirx.Shuffle(vectors, lanes), "float32x16"))
            store(out, (i // 16 * GROUP + j) * 256 + i % 16 * 16, column)


def _tables(isa: Isa, *arguments: Any) -> None:
    """Planes [group, plane, codebook, 256] of groups begin..end; x has 8 activations for each, books are turned."""
    del isa
    x, books, count, factor, begin, end, out = arguments
    with for_range(begin, end) as group:
        inputs = [bind(T.broadcast(load(x, group * GROUP + j, 1) * factor, 16)) for j in range(GROUP)]
        with for_range(0, count) as m, for_range(0, 16) as i:
            total = None
            for j in range(GROUP):
                entries = load(books, (m * GROUP + j) * 256 + i * 16)
                total = bind(inputs[j] * entries if total is None else T.fma(inputs[j], entries, total))
            whole = T.cast(T.floor(total + T.broadcast(T.float32(0.5), 16)), "int32x16")
            fixed = bind(whole + _splat(1 << 23, "int32", 16))
            for plane in range(PLANES):
                byte = T.cast(fixed >> _splat(8 * plane, "int32", 16) if plane else fixed, "uint8x16")
                store(out, ((group * PLANES + plane) * count + m) * 256 + i * 16, byte)


def _blocks(a: Any, b: Any, which: list[int]) -> Any:
    """A vector of 64 bytes of four 16-byte blocks of a (0-3) and b (4-7)."""
    first, second = (T.reinterpret("int64x8", v) for v in (a, b))
    lanes = [2 * block + half for block in which for half in range(2)]
    return T.reinterpret("uint8x64", shuffle(first, second, lanes))


def _indices(books: int, lines: list[Any]) -> list[list[Any]]:
    """Codes of one line of each of four panels, by group and codebook, as indices of 64 rows.

    Two codebooks: even bytes are the first two panels, odd ones the others. One: rows in their order.
    """
    if books == 1:
        first = [bind(_blocks(lines[0], lines[1], [i, i + 1, 4 + i, 5 + i])) for i in (0, 2)]
        second = [bind(_blocks(lines[2], lines[3], [i, i + 1, 4 + i, 5 + i])) for i in (0, 2)]
        return [
            [bind(_blocks(first[g // 2], second[g // 2], [g % 2, 2 + g % 2, 4 + g % 2, 6 + g % 2]))]
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
        found.append([bind(T.reinterpret("uint8x64", words)) for words in both])
    return found


def _look_up(table: list[Any], index: Any) -> Any:
    """256 bytes in four vectors at 64 indices."""
    low, high = (
        T.call_llvm_pure_intrin(
            "uint8x64", "llvm.x86.avx512.vpermi2var.qi.512", table[i], index, table[i + 1]
        )
        for i in (0, 2)
    )
    upper = T.reinterpret("int8x64", index) < _splat(0, "int8", 64)
    return T.Select(upper, high, low)


def _lookup(books: int, isa: Isa, *arguments: Any) -> None:
    """out[0:256] = sums over groups of 16 panels, ``stride`` bytes apart; of fewer ``panels`` of the last one again."""
    if not isa.vnni:
        return  # nothing calls it
    w, stride, panels, tables, groups, inverse, sums, out = arguments
    per_line = 4 // books
    every = [(plane, s) for plane in range(PLANES) for s in range(SETS)]
    words, highs = (registers(PLANES * SETS, "uint16", 32) for _ in range(2))
    held = registers(SETS * 4, "uint8", 64)
    starts = [bind(tirx.min(tirx.const(i, "int64"), panels - 1) * stride) for i in range(PANELS)]
    with for_range(0, PLANES * SETS * 4) as i:
        store(sums, i * 16, _splat(0, "int32", 16))
    most = FLUSH // books
    with for_range(0, (groups + most - 1) // most) as part:
        for i in range(PLANES * SETS):
            store(words, i * 32, _splat(0, "uint16", 32), 32)
            store(highs, i * 32, _splat(0, "uint16", 32), 32)
        first = bind(part * (most // per_line))
        with for_range(first, tirx.min(first + most // per_line, groups // per_line)) as line:
            # Behind these groups lies what is read much later, or now: go on where the next panels' ones are.
            behind = line * 64 + AHEAD >= groups * (16 * books)
            ahead = bind(AHEAD + T.Select(behind, stride * PANELS - groups * (16 * books), T.int64(0)))
            for s in range(SETS):
                lines = []
                for i in range(4):
                    at = bind(starts[4 * s + i] + line * 64)
                    prefetch(w, at + ahead, 0)
                    lines.append(bind(load(w, at, 64)))
                vectors = [index for group in _indices(books, lines) for index in group]
                for i, index in enumerate(vectors):
                    store(held, (i * SETS + s) * 64, index, 64)
            for i in range(4):
                indices = [bind(load(held, (i * SETS + s) * 64, 64)) for s in range(SETS)]
                group, m = bind(line * per_line + i // books), i % books
                for plane in range(PLANES):
                    start = bind(((group * PLANES + plane) * books + m) * 256)
                    table = [bind(load(tables, start + 64 * j, 64)) for j in range(4)]
                    for s in range(SETS):
                        found = _look_up(table, indices[s])
                        found = bind(T.reinterpret("uint16x32", found))
                        at = (plane * SETS + s) * 32
                        store(words, at, load(words, at, 32) + found, 32)
                        shifted = found >> _splat(8, "uint16", 32)
                        store(highs, at, load(highs, at, 32) + shifted, 32)
        for plane, s in every:
            at = (plane * SETS + s) * 32
            odd = bind(load(highs, at, 32))
            even = bind(load(words, at, 32) - (odd << _splat(8, "uint16", 32)))
            for half, lanes in enumerate((even, odd)):
                place = ((plane * SETS + s) * 2 + half) * 32
                store(sums, place, load(sums, place, 32) + T.cast(lanes, "int32x32"), 32)
    # Of every entry 2^23 too much.
    offset = T.broadcast(T.cast(groups * (128 * books), "int32"), 16)
    for s in range(SETS):
        for part in range(2):
            totals = []
            for half in range(2):
                planes = [
                    T.cast(value - offset if plane == PLANES - 1 else value, "float32x16")
                    for plane in range(PLANES)
                    for value in (load(sums, ((plane * SETS + s) * 2 + half) * 32 + part * 16),)
                ]
                total = planes[0]
                for plane in range(1, PLANES):
                    total = T.fma(planes[plane], T.broadcast(T.float32(256.0**plane), 16), total)
                totals.append(bind(total * T.broadcast(inverse, 16)))
            even, odd = totals
            if books == 2:
                store(out, s * 64 + part * 16, even)
                store(out, s * 64 + 32 + part * 16, odd)
                continue
            for half in range(2):
                lanes = [half * 8 + i // 2 + 16 * (i % 2) for i in range(16)]
                store(out, s * 64 + part * 32 + half * 16, shuffle(even, odd, lanes))


KERNELS = [
    Kernel("codebook_turn", "stored: const f16*, count: i64, out: f32*", _turn, "codebook"),
    Kernel(
        "codebook_tables",
        "x: const f32*, books: const f32*, count: i64, factor: f32, begin: i64, end: i64, out: u8*",
        _tables,
        "codebook",
    ),
    # sums: 384 int32 for each 64 rows of 16 panels; tables are 64-byte aligned
    *(
        Kernel(
            f"codebook_lookup{books}",
            "w: const u8*, stride: i64, panels: i64, tables: const u8*, groups: i64, inverse: f32, sums: i32*, "
            "out: f32*",
            partial(_lookup, books),
            "codebook_vbmi",
            attributes=VBMI2,
        )
        for books in (1, 2)
    ),
]
