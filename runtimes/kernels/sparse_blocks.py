"""Linears on blocks of 16 rows of weights: the dense inner product with columns left out (layouts `16x1`, `16x4`).

Identity: ``t[m, r] = sum_b values[b, r] x[m, places[b]]`` for a panel of 16 rows, where an x is a float, or (16x4) four
codes and the product is the sum of four. One row of activations: a block is a load of 16 values and a broadcast of what
it meets. Many rows: activations lie transposed as in `sparse_many.py`, and four rows of weights share what is loaded of
them: the arithmetic of the dense kernels, at their rate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .linear import prefetch
from .sparse_many import GEMM_VECTORS, multiply_add, splat, widen_bfloat16

ROWS = (4, 2, 1)
"""Rows of activations of the kernels for few."""

KINDS = (
    ("blocks", "float32", "f32", "f32"),
    ("blocks16", "uint16", "f32", "u16"),
    ("blocks8", "int32", "i32", "i32"),
)
"""Name, kind of :func:`multiply_add` or uint16 for the bits of a bfloat16, types of activations and values."""

AHEAD = 2048
"""Bytes ahead of what is fetched of values."""


def _accumulated(kind: str) -> str:
    return "int32" if kind == "int32" else "float32"


def _gemv(rows: int, kind: str, isa: Isa, *arguments: Any) -> None:
    """``t[m, 0..15]`` of R rows of activations and the ``count`` blocks of one panel."""
    x, ldx, places, values, count, t, ldt = arguments
    dtype, ways = _accumulated(kind), 4 if rows == 1 else 2
    lanes = 8 if kind == "int32" and not isa.vnni else 16
    parts = 16 // lanes
    sums = registers(rows * ways * parts, dtype, lanes)
    for i in range(rows * ways * parts):
        store(sums, i * lanes, splat(0, dtype, lanes), lanes)

    def block(b: Any, way: int) -> None:
        column = bind(T.cast(load(places, b, 1), "int64"))
        for part in range(parts):
            weight = bind(load(values, b * 16 + part * lanes, lanes))
            if kind == "uint16":
                weight = widen_bfloat16(weight)
            for m in range(rows):
                at = ((m * ways + way) * parts + part) * lanes
                found = T.broadcast(load(x, m * ldx + column, 1), lanes)
                store(sums, at, multiply_add(isa, kind, load(sums, at, lanes), found, weight), lanes)

    with for_range(0, count // 4) as four:
        for line in range(2 if kind == "uint16" else 4):
            prefetch(values, four * 64 + (AHEAD + 64 * line) // (2 if kind == "uint16" else 4), 3)
        for j in range(4):
            block(four * 4 + j, j % ways)
    with for_range(count // 4 * 4, count) as b:
        block(b, 0)
    for m in range(rows):
        for part in range(parts):
            found = [load(sums, ((m * ways + w) * parts + part) * lanes, lanes) for w in range(ways)]
            while len(found) > 1:
                found = [bind(a + b) for a, b in zip(found[::2], found[1::2], strict=True)]
            store(t, m * ldt + part * lanes, found[0], lanes)


def _gemm(vectors: int, kind: str, isa: Isa, *arguments: Any) -> None:
    """``acc[r, 16 V] += `` the products of ``count`` blocks of a panel and transposed activations."""
    xt, places, values, count, acc = arguments
    dtype, wide = _accumulated(kind), isa.registers == 32
    lanes = 8 if kind == "int32" and not isa.vnni else 16
    width, height = 16 * vectors, 4 if wide else 1
    parts = width // lanes
    with for_range(0, 16 // height) as quarter:
        sums = registers(height * parts, dtype, lanes)
        for r in range(height):
            for v in range(parts):
                at = (quarter * height + r) * width + v * lanes
                store(sums, (r * parts + v) * lanes, load(acc, at, lanes), lanes)
        with for_range(0, count) as b:
            row = bind(T.cast(load(places, b, 1), "int64") * width)
            found = [bind(load(xt, row + v * lanes, lanes)) for v in range(parts)]
            for r in range(height):
                value = load(values, b * 16 + quarter * height + r, 1)
                if kind == "uint16":
                    value = T.reinterpret("float32", T.cast(value, "uint32") << T.uint32(16))
                weight = bind(T.broadcast(value, lanes))
                for v in range(parts):
                    at = (r * parts + v) * lanes
                    store(sums, at, multiply_add(isa, kind, load(sums, at, lanes), found[v], weight), lanes)
        for r in range(height):
            for v in range(parts):
                at = (quarter * height + r) * width + v * lanes
                store(acc, at, load(sums, (r * parts + v) * lanes, lanes), lanes)


def _kernels() -> list[Kernel]:
    kernels = []
    for name, kind, x, value in KINDS:
        for rows in ROWS:
            signature = f"x: const {x}*, ldx: i64, places: const u16*, values: const {value}*, count: i64"
            signature += f", t: {x}*, ldt: i64"
            emit = partial(_gemv, rows, kind)
            kernels.append(Kernel(f"{name}_gemv_{rows}", signature, emit, "sparse_blocks"))
        for vectors in GEMM_VECTORS:
            signature = f"xt: const {x}*, places: const u16*, values: const {value}*, count: i64, acc: {x}*"
            emit = partial(_gemm, vectors, kind)
            kernels.append(Kernel(f"{name}_gemm_{vectors}", signature, emit, "sparse_blocks"))
    return kernels


KERNELS = _kernels()
