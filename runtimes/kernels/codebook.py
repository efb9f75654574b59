"""Linears on additive codebooks (AQLM), with float activations.

Identity: ``t[m, n] = scale[n] sum_g sum_j x[m, 8 g + j] sum_i C_i[code[n, g, i], j]``; the tile for many rows and the
epilogue are those of linear_float.py. Layout: compiler/dialect/packing_codebook.py.

* Few rows (``codebook_gemv{b}_{count}_R``): a vector of 8 weights is one load, at the address that its code says.
  Vectors of the codebooks are added, and one multiply-add with 8 activations goes to a row's own accumulator of 8
  lanes; lanes are summed once per panel. Kernels take one or two codebooks of the M; the driver calls them until all
  are done.
* Many rows (``codebook_unpack{b}_{count}``): the same vectors of 16 rows and 16 inputs, transposed in registers.

8-bit codebooks are read as float32 (``codebook_expand``: 8 KiB each, two of them in the first-level cache), 16-bit
ones (1 MiB) as the float16 that they are stored as.

Why vectors are decoded, and no table ``x . C`` is made for each group of inputs (AQLM's CPU kernel): one row of x takes
as many loads either way, one of a table's entry or one of a vector for each code, and that is the bound; tables are
M 2^b floats for every group, 1 MiB at K = 4096 and 2x8, read anew for every panel unless all panels are cut into
chunks of K, and 256 KiB for each group at 1x16. With more rows of x a vector is decoded once for all, a table is not.

The bound of the 2x8 GEMV: 8 weights are 2 bytes, and take two loads of codes, two of vectors, two shifts of indices,
an add (its load folded) and a multiply-add: 4 loads and 7 operations, on Zen 4 (3 loads, 6 operations a cycle) 1.33
cycles, 1.5 bytes a cycle and core. Arithmetic is the limit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .linear import prefetch_stream
from .linear_float import BLOCK, GEMV_ROWS
from .math import reduce_lanes, transpose16

GROUP = 8
"""Inputs of one vector."""

COUNTS = (1, 2)
"""Codebooks that a kernel sums."""


def _splat(value: float, lanes: int = GROUP) -> Any:
    return T.broadcast(tirx.const(value, "float32"), lanes)


class _Books:
    """``count`` of the M codebooks from the m-th on: the vector that a row's codes of one group stand for."""

    def __init__(self, bits: int, count: int, w: Any, books: Any, m: Any, total: Any) -> None:
        self.count, self.w, self.books, self.m, self.total = count, w, books, m, total
        self.size = 1 << bits

    def vector(self, group: Any, row: int) -> Any:
        """float32x8."""
        at = bind((group * 16 + row) * self.total + self.m)
        found = None
        for i in range(self.count):
            code = T.cast(load(self.w, at + i, 1), "int64")
            part = load(self.books, ((self.m + i) * self.size + code) * GROUP, GROUP)
            part = part if str(part.ty.dtype).startswith("float32") else T.cast(part, "float32x8")
            found = part if found is None else found + part
        return bind(found)


def _gemv(bits: int, count: int, rows: int, isa: Isa, *arguments: Any) -> None:
    """t[r, 0:16] += the panel's dot products with row r over blocks begin..end; x points at input ``32 * begin``."""
    x, ldx, w, books, m, total, scale, begin, end, t, ldt = arguments
    source = _Books(bits, count, w, books, m, total)
    width = 2 if bits == 16 else 1
    accumulators = 16 if isa.registers == 32 else 8
    together = accumulators // rows
    for first in range(0, 16, together):
        acc = registers(together * rows, "float32", GROUP)
        for i in range(together * rows):
            store(acc, i * GROUP, _splat(0.0), GROUP)
        with for_range(begin, end) as block:
            if first == 0:
                for ahead in range(0, BLOCK // GROUP * 16 * width * count, 64):
                    prefetch_stream(w, block * (BLOCK // GROUP * 16) * total + ahead // width)
            for g in range(BLOCK // GROUP):
                inputs = [
                    bind(load(x, ldx * r + (block - begin) * BLOCK + g * GROUP, GROUP)) for r in range(rows)
                ]
                for row in range(together):
                    weights = source.vector(block * (BLOCK // GROUP) + g, first + row)
                    for r in range(rows):
                        i = (row * rows + r) * GROUP
                        store(acc, i, T.fma(weights, inputs[r], load(acc, i, GROUP)), GROUP)
        for row in range(together):
            for r in range(rows):
                value = reduce_lanes(bind(load(acc, (row * rows + r) * GROUP, GROUP)), lambda a, b: a + b)
                at = ldt * r + (first + row)
                store(t, at, load(t, at, 1) + value * load(scale, first + row, 1), 1)


def _unpack(bits: int, count: int, isa: Isa, *arguments: Any) -> None:
    """out[k, 0:16] = decoded weights of one panel over blocks begin..end, or added to it; rows 32 floats apart."""
    w, books, m, total, scale, begin, end, accumulate, out = arguments
    source = _Books(bits, count, w, books, m, total)
    scales = bind(load(scale, 0))
    pair = registers(16, "float32", 16)
    with for_range(begin * 2, end * 2) as half:
        for row in range(16):
            for g in range(2):
                store(pair, row * 16 + g * GROUP, source.vector(half * 2 + g, row), GROUP)
        columns = transpose16([bind(load(pair, row * 16)) for row in range(16)])
        with T.If(accumulate != T.int32(0)):
            with T.Then():
                for k, column in enumerate(columns):
                    at = (half - begin * 2) * 512 + k * 32
                    store(out, at, T.fma(column, scales, load(out, at)))
            with T.Else():
                for k, column in enumerate(columns):
                    store(out, (half - begin * 2) * 512 + k * 32, column * scales)


def _expand(isa: Isa, source: Any, vectors: Any, out: Any) -> None:
    """``vectors`` vectors of 8 float16 to float32."""
    with for_range(0, vectors) as i:
        store(out, i * GROUP, T.cast(load(source, i * GROUP, GROUP), "float32x8"), GROUP)


def _kernels() -> list[Kernel]:
    kernels = [Kernel("codebook_expand", "source: const f16*, vectors: i64, out: f32*", _expand, "codebook")]
    for bits, code, entry in ((8, "u8", "f32"), (16, "u16", "f16")):
        panel = f"w: const {code}*, books: const {entry}*, m: i64, total: i64, scale: const f32*, begin: i64, end: i64"
        for count in COUNTS:
            for rows in GEMV_ROWS:
                signature = f"x: const f32*, ldx: i64, {panel}, t: f32*, ldt: i64"
                emit = partial(_gemv, bits, count, rows)
                kernels.append(Kernel(f"codebook_gemv{bits}_{count}_{rows}", signature, emit, "codebook"))
            signature = f"{panel}, accumulate: i32, out: f32*"
            emit = partial(_unpack, bits, count)
            kernels.append(Kernel(f"codebook_unpack{bits}_{count}", signature, emit, "codebook"))
    return kernels


KERNELS = _kernels()
