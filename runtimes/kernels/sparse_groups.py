"""Linears on int8 weights with N values in every M inputs: indices pick the activations (layouts `1:4`, `2:4`, `4:8`).

Identity: ``t[n] = sum_j values[n, j] u[M (j // N) + index[n, j]]``. The indices of 64 values are widened to bytes by
one ``vpmultishiftqb``, the groups' numbers are added, and ``vpermi2b`` takes the activations out of 128 inputs in
registers (1:4: twice, 256 inputs); four rows of weights share these. Per 64 values that is 5 operations where a
bitmask expands two words (2:4) for 8. Needs AVX512-VBMI; elsewhere, and with many rows of activations, the list of
`sparse_many.py`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .dot import vpdpbusd
from .linear import prefetch
from .math import reduce_lanes
from .sparse_many import STEP, VBMI2, splat

GROUPS = {"1_4": (1, 4, 2), "2_4": (2, 4, 2), "4_8": (4, 8, 3)}
"""Values and inputs of a group, bits of an index (compiler/dialect/sparse_groups.py)."""

SHARED = 4
"""Rows of weights that share activations in registers; ``rows`` is a multiple of it."""


def _bytes(values: list[int]) -> Any:
    """A constant int8x64: broadcasts and ramps only, so built from 16 words of 4 bytes where these step evenly."""
    words = [sum((b & 255) << (8 * i) for i, b in enumerate(values[j : j + 4])) for j in range(0, 64, 4)]
    step = (words[1] - words[0]) & 0xFFFFFFFF
    assert all((b - a) & 0xFFFFFFFF == step for a, b in pairwise(words))
    signed = [w - (1 << 32) if w >> 31 else w for w in (words[0], step)]
    ramp = T.ramp(tirx.const(signed[0], "int32"), tirx.const(signed[1], "int32"), 16)
    return T.reinterpret("int8x64", ramp)


def _index(width: int, packed: Any) -> Any:
    """64 indices of ``width`` bits as bytes, still with the bits of their neighbours above them."""
    if width == 2:
        words = T.cast(T.reinterpret("uint16x8", packed), "uint64x8")
    else:
        lanes = [tirx.const(3 * q + min(b, 2), "int32") for q in range(8) for b in range(8)]
        words = T.reinterpret("uint64x8", tirx.Shuffle([packed, splat(0, "uint8", 40)], lanes))
    shifts = sum(width * i << (8 * i) for i in range(8))
    control = T.reinterpret("int8x64", T.broadcast(tirx.const(shifts, "int64"), 8))
    name = "llvm.x86.avx512.pmultishift.qb.512"
    return T.call_llvm_pure_intrin("int8x64", name, control, T.reinterpret("int8x64", words))


def _gemv(pattern: str, isa: Isa, *arguments: Any) -> None:
    """Sums ``t[0..rows]`` of some rows of weights of ``blocks`` blocks and one row of activations."""
    x, values, places, blocks, rows, t = arguments
    if not isa.vnni:
        return  # never called: the driver takes lists
    some, of, width = GROUPS[pattern]
    inputs, stored = 64 // some * of, 8 * width
    # Of the 1:4 pattern's 256 inputs the highest bit is not looked at, see below.
    base = bind(_bytes([of * (j // some) for j in range(64)]))
    keep = splat((1 << width) - 1, "int8", 64)
    sums = registers(SHARED, "int32", 16)
    with for_range(0, rows // SHARED) as four:
        for i in range(SHARED):
            store(sums, i * 16, splat(0, "int32", 16))
        with for_range(0, blocks) as b:
            tables = [
                bind(T.reinterpret("int8x64", load(x, b * inputs + 64 * i, 64))) for i in range(inputs // 64)
            ]
            for i in range(SHARED):
                at = bind((four * SHARED + i) * blocks + b)
                prefetch(values, (at + blocks * SHARED) * 64, 3)  # the next four rows
                prefetch(places, (at + blocks * SHARED) * stored, 3)
                index = bind((_index(width, load(places, at * stored, stored)) & keep) | base)
                name = "llvm.x86.avx512.vpermi2var.qi.512"
                found = [
                    T.call_llvm_pure_intrin("int8x64", name, tables[j], index, tables[j + 1])
                    for j in range(0, len(tables), 2)
                ]
                if len(found) == 2:  # the first 32 values belong to the first 128 inputs
                    lanes = [tirx.const(j if j < 32 else 64 + j, "int32") for j in range(64)]
                    found = [tirx.Shuffle([bind(f) for f in found], lanes)]
                codes = T.reinterpret("int32x16", bind(found[0]))
                store(sums, i * 16, vpdpbusd(load(sums, i * 16), codes, load(values, at * 64, 64)))
        for i in range(SHARED):
            store(t, four * SHARED + i, reduce_lanes(load(sums, i * 16), lambda a, b: a + b), 1)


def _list(pattern: str, isa: Isa, *arguments: Any) -> None:
    """The list of sparse_many.py of ``count`` blocks of ``rows`` rows; ``ld`` blocks lie between two rows."""
    values, places, ld, count, rows, out, copy, ldout, counts = arguments
    some, of, width = GROUPS[pattern]
    inputs = 64 // some * of
    with for_range(0, rows) as r:
        with for_range(0, count) as b:
            at = bind(r * ld + b)
            to = bind(r * ldout + b * 64)
            store(copy, to, load(values, at * 64, 64), 64)
            with for_range(0, 8) as q:
                parts = [T.cast(load(places, (at * 8 + q) * width + i, 1), "int32") for i in range(width)]
                word = parts[0]
                for i, part in enumerate(parts[1:], 1):
                    word = word | (part << T.int32(8 * i))
                word = bind(word)
                first = bind(T.cast(b * inputs + q * (inputs // 8), "int32"))
                for j in range(8):
                    index = (word >> T.int32(width * j)) & T.int32((1 << width) - 1)
                    place = (first + T.int32(of * (j // some)) + index) << T.int32(6)
                    store(out, to + q * 8 + j, T.cast(place, "uint16"), 1)
        end = bind(r * ldout + count * 64)
        store(copy, end, splat(0, "int8", STEP), STEP)
        store(out, end, splat(0, "uint16", STEP), STEP)
        store(counts, r, count * 64, 1)


def _kernels() -> list[Kernel]:
    kernels = []
    for pattern in GROUPS:
        signature = "x: const u8*, values: const i8*, places: const u8*, blocks: i64, rows: i64, t: i32*"
        emit = partial(_gemv, pattern)
        kernels.append(Kernel(f"sparse_{pattern}_gemv", signature, emit, "sparse_vbmi2", attributes=VBMI2))
        signature = (
            "values: const i8*, places: const u8*, ld: i64, count: i64, rows: i64, out: u16*, copy: i8*"
        )
        signature += ", ldout: i64, counts: i64*"
        kernels.append(Kernel(f"sparse_{pattern}_list", signature, partial(_list, pattern), "sparse_many"))
    return kernels


KERNELS = _kernels()
