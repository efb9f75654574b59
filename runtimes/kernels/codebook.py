"""Linears on additive codebooks (AQLM), with float activations.

Identity: ``t[m, n] = scale[n] sum_g sum_j x[m, 8 g + j] sum_i C_i[code[n, g, i], j]``; the tile for many rows and the
epilogue are those of linear_float.py. Layout: compiler/dialect/packing_codebook.py.

* Few rows (``codebook_gemv{b}_{all,some}{count}_R``): a vector of 8 weights is one load, at the address that its code
  says. Vectors of the codebooks are added, and one multiply-add with 8 activations goes to a row's own accumulator of 8
  lanes; lanes are summed once per panel. Kernels take one or two codebooks: all there are, or some of the M, and then
  the driver calls them until all are done.
* Many rows (``codebook_unpack{b}_{count}``): the same vectors of 16 rows and 16 inputs, transposed in registers.

8-bit codebooks are read as float32 (``codebook_expand``: 8 KiB each, two of them in the first-level cache), 16-bit
ones (1 MiB) as the float16 that they are stored as.

With AVX512-VBMI, few rows of 8-bit codes meet many output features another way: codebook_tables.py, whose lookups are
in registers. For all else: why vectors are decoded, and no table ``x . C`` is made for each group of inputs (AQLM's CPU
kernel): one row of x takes as many loads either way, one of a table's entry or one of a vector for each code, and that
is the bound; tables are M 2^b floats for every group, 1 MiB at K = 4096 and 2x8, read anew for every panel unless all
panels are cut into chunks of K, and 256 KiB for each group at 1x16. With more rows of x a vector is decoded once for
all, a table is not.

The bound of the 2x8 GEMV: 8 weights are 2 bytes. They take two shifts and two masks of indices (8 bytes of codes are
one load), two loads of vectors (one folded into the add) and a multiply-add: 7 operations, on Zen 4 with its 6 a cycle
1.2 cycles, 1.7 bytes a cycle and core. Arithmetic is the limit.
"""

from __future__ import annotations

from functools import partial
from itertools import product
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
    """``count`` of the M codebooks from the m-th on: the vector that a row's codes of one group stand for.

    whole: these are all M, so that codes lie side by side and are fetched 8 bytes at a time.
    """

    def __init__(self, bits: int, count: int, whole: bool, w: Any, books: Any, m: Any, total: Any) -> None:
        self.bits, self.count, self.whole, self.w, self.books = bits, count, whole, w, books
        self.m: Any = 0 if whole else m
        self.total: Any = count if whole else total
        self.words: dict[int, Any] = {}
        self.group: Any = None

    def _code(self, group: Any, row: int, i: int) -> Any:
        if not self.whole:
            return T.cast(load(self.w, (group * 16 + row) * self.total + self.m + i, 1), "int64")
        per_word = 64 // self.bits
        word, place = divmod(row * self.count + i, per_word)
        if group is not self.group:
            self.group, self.words = group, {}
        if word not in self.words:
            codes = load(self.w, group * (16 * self.count) + word * per_word, per_word)
            self.words[word] = bind(T.reinterpret("int64", codes))
        shifted = self.words[word] >> T.int64(self.bits * place) if place else self.words[word]
        return shifted & T.int64((1 << self.bits) - 1)

    def vector(self, group: Any, row: int) -> Any:
        """float32x8."""
        found = None
        for i in range(self.count):
            code = self._code(group, row, i)
            part = load(self.books, (((self.m + i) << self.bits) + code) * GROUP, GROUP)
            part = part if str(part.ty.dtype).startswith("float32") else T.cast(part, "float32x8")
            found = part if found is None else found + part
        return bind(found)


def _gemv(bits: int, count: int, whole: bool, rows: int, isa: Isa, *arguments: Any) -> None:
    """t[r, 0:16] += the panel's dot products with row r over blocks begin..end; x points at input ``32 * begin``."""
    x, ldx, w, books, m, total, scale, begin, end, t, ldt = arguments
    source = _Books(bits, count, whole, w, books, m, total)
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
                    prefetch_stream(w, block * (BLOCK // GROUP * 16) * source.total + ahead // width)
            for g in range(BLOCK // GROUP):
                group = bind(block * (BLOCK // GROUP) + g)
                inputs = [
                    bind(load(x, ldx * r + (block - begin) * BLOCK + g * GROUP, GROUP)) for r in range(rows)
                ]
                for row in range(together):
                    weights = source.vector(group, first + row)
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
    source = _Books(bits, count, False, w, books, m, total)
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
            for whole, rows in product((True, False), GEMV_ROWS):
                signature = f"x: const f32*, ldx: i64, {panel}, t: f32*, ldt: i64"
                emit = partial(_gemv, bits, count, whole, rows)
                name = f"codebook_gemv{bits}_{'all' if whole else 'some'}{count}_{rows}"
                kernels.append(Kernel(name, signature, emit, "codebook"))
            signature = f"{panel}, accumulate: i32, out: f32*"
            emit = partial(_unpack, bits, count)
            kernels.append(Kernel(f"codebook_unpack{bits}_{count}", signature, emit, "codebook"))
    return kernels


KERNELS = _kernels()
