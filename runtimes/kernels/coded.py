"""Linears on weights of codes: tables of 16 floats, FP8, MX and NVFP4, with float activations.

Identity: ``t[m, n] = sum_k x[m, k] value[code[n, k]] scale[n, g(k)]``; everything else is as in linear_float.py,
whose tile for many rows and whose epilogue these kernels share. Layouts: compiler/dialect/packing_coded.py.

How 16 codes of one input become 16 floats, exactly:

* 4 bits (nf4, table4, E2M1): the 16 entries stay in registers. v4: a shift brings the nibble to the bottom of its
  32-bit lane, ``vpermps`` looks it up (it reads the low four bits of a lane only): 2 operations, and 1 multiply-add.
  v3: two ``vpermps`` on halves of the table and a blend by the nibble's top bit, on 8 lanes: 5 operations and 1.
* FP8 and 6 bits: a code is shifted into the sign, exponent and mantissa bits of a float16, whose exponent has more
  bits than any of theirs; ``vcvtph2ps`` widens it, subnormals included and whatever the rounding and denormal modes
  are. The result is the value times 2**(bias - 15), a power of two that the driver multiplies back through
  ``scale_multiplier`` (:data:`UNIT`). Sign and the rest are not neighbours in the float16: an arithmetic shift
  copies the sign down over the gap, and one mask clears the copies.

Scales of a group: float16, E8M0 (shifted into the exponent of a float32; 2**-127, code 0, is read as 0), E4M3 as above.

The bound of the 4-bit GEMV on v4 is arithmetic on Zen 4: 64 bytes are 128 codes, 7 shifts, 8 ``vpermps`` and 8
multiply-adds of 512 bits; it does each as two halves, shifts and permutations on two of its four vector pipes, so 15
cycles for 64 bytes, 4.3 bytes a cycle and core. Zen 5 shifts on other pipes than it permutes and multiplies on (one of
two is shared with each): 23 operations on four pipes, 5.75 cycles, 11 bytes a cycle and core, what its memory gives.
Four chains of sums would take 8 cycles there, two multiply-adds of each one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .linear import prefetch_stream
from .linear_float import BLOCK, GEMV_ROWS

ELEMENTS = ("table", "e4m3", "e5m2", "e3m2", "e2m3")
"""How codes become floats, in the order of the driver's enum."""

SCALES = ("pc", "g", "e8m0", "e4m3")
"""Per channel float32, groups of float16, of E8M0, of E4M3; in the order of the driver's enum."""

UNIT = {"table": 1.0, "e4m3": 2.0**8, "e5m2": 1.0, "e3m2": 2.0**12, "e2m3": 2.0**14}
"""What the decoded numbers must be multiplied by."""

_BITS = {"table": 4, "e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6}

VARIANTS = (
    *(("table", mode) for mode in SCALES),
    *((element, mode) for element in ("e4m3", "e5m2") for mode in ("pc", "g", "e8m0")),
    ("e3m2", "e8m0"),
    ("e2m3", "e8m0"),
)


def _splat(value: float, dtype: str, lanes: int = 16) -> Any:
    return T.broadcast(tirx.const(value, dtype), lanes)


def _shift(value: Any, left: int) -> Any:
    """int16x16 shifted left, or right (arithmetic) where ``left`` is negative."""
    if left == 0:
        return value
    return value << _splat(left, "int16") if left > 0 else value >> _splat(-left, "int16")


def _mask(value: Any, mask: int) -> Any:
    return value & _splat(mask - (1 << 16) if mask >= 1 << 15 else mask, "int16")


def _float(half: Any) -> Any:
    """int16x16, bits of float16, to float32x16."""
    return T.cast(T.reinterpret("float16x16", half), "float32x16")


class _Decoder:
    """Codes of one panel to floats: each input in turn as ``parts`` vectors of ``lanes`` rows."""

    def __init__(self, element: str, isa: Isa, w: Any, table: Any) -> None:
        self.element, self.w = element, w
        self.bits = _BITS[element]
        # The permutations of a table have the width of a register; all else is 16 lanes wide on both.
        self.lanes = 8 if element == "table" and not isa.vnni else 16
        self.parts = 16 // self.lanes
        self.table = [bind(load(table, i * self.lanes, self.lanes)) for i in range(self.parts)]

    def inputs(self, at: Any, count: int) -> Iterator[list[Any]]:
        """The next ``count`` inputs from byte ``at`` of the weights on, as lists of parts."""
        bytes_per_input = 2 * self.bits
        fetched = -1
        for first in range(0, count, 2 if self.bits == 8 else 8):
            offset = first * bytes_per_input
            if offset // 64 > fetched:
                fetched = offset // 64
                prefetch_stream(self.w, at + offset)
            yield from getattr(self, f"_bits{self.bits}")(at + offset)

    def _bits4(self, at: Any) -> Iterator[list[Any]]:
        n = self.lanes
        dtype = f"int32x{n}"
        words = [
            bind(T.reinterpret(dtype, load(self.w, at + part * n * 4, 4 * n))) for part in range(self.parts)
        ]
        for k in range(8):
            position = 8 * (k % 4) + 4 * (k // 4)
            yield [bind(self._look_up(word, position, dtype)) for word in words]

    def _look_up(self, word: Any, position: int, dtype: str) -> Any:
        n = self.lanes
        index = word >> _splat(position, "int32", n) if position else word
        if n == 16:
            return T.call_llvm_pure_intrin(
                "float32x16", "llvm.x86.avx512.permvar.sf.512", self.table[0], index
            )
        index = bind(index)
        low, high = (
            T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", half, index) for half in self.table
        )
        top = word << _splat(28 - position, "int32", n) if position < 28 else word
        return T.Select(top < _splat(0, "int32", n), high, low)

    def _word(self, at: Any) -> Any:
        return bind(T.reinterpret("int16x16", load(self.w, at, 32)))

    def _bits8(self, at: Any) -> Iterator[list[Any]]:
        word = self._word(at)
        if self.element == "e5m2":  # the high byte of a float16
            yield [bind(_float(_shift(word, 8)))]
            yield [bind(_float(_mask(word, 0xFF00)))]
            return
        yield [bind(_float(_mask(_shift(_shift(word, 8), -1), 0xBF80)))]
        yield [bind(_float(_mask(_shift(word, -1), 0xBF80)))]

    def _bits6(self, at: Any) -> Iterator[list[Any]]:
        lows = [self._word(at), self._word(at + 32)]
        high = self._word(at + 64)
        # Low four bits end at bit `end`; of the high two the sign goes to bit 15, the other to bit end + 4.
        end, low_mask, high_mask, gap = (
            (8, 0x0F00, 0x9000, 2) if self.element == "e3m2" else (7, 0x0780, 0x8800, 3)
        )
        for k in range(8):
            low = _mask(_shift(lows[k // 4], end - 4 * (k % 4)), low_mask)
            top = _mask(_shift(_shift(high, 14 - 2 * k), -gap), high_mask)
            yield [bind(_float(low | top))]


def _scale(mode: str, scale: Any, group: Any, part: int, lanes: int) -> Any:
    """The scales of a group as floats; per channel the group is 0."""
    at = group * 16 + part * lanes
    if mode == "pc":
        return T.reinterpret(f"float32x{lanes}", load(scale, at * 4, 4 * lanes))
    if mode == "g":
        return T.cast(T.reinterpret(f"float16x{lanes}", load(scale, at * 2, 2 * lanes)), f"float32x{lanes}")
    codes = load(scale, at, lanes)
    if mode == "e8m0":
        bits = T.cast(codes, f"int32x{lanes}") << _splat(23, "int32", lanes)
        return T.reinterpret(f"float32x{lanes}", bits)
    half = T.cast(codes, f"int16x{lanes}") << _splat(7, "int16", lanes)
    return T.cast(T.reinterpret(f"float16x{lanes}", half), f"float32x{lanes}")


def _group_of(mode: str, block: Any, half: int, per_group: Any) -> Any:
    if mode == "pc":
        return 0
    return block * 2 + half if mode == "e4m3" else block // per_group


def _halves(mode: str) -> int:
    """Groups of a block."""
    return 2 if mode == "e4m3" else 1


def _gemv(element: str, mode: str, rows: int, isa: Isa, *arguments: Any) -> None:
    """t[r, 0:16] += the panel's dot products with row r over blocks begin..end; x points at input ``32 * begin``."""
    x, ldx, w, scale, table, begin, end, group, t, ldt = arguments
    decoder = _Decoder(element, isa, w, table)
    n, parts, bits = decoder.lanes, decoder.parts, decoder.bits
    halves = _halves(mode)
    # Chains of multiply-adds, each of which waits four cycles for itself; 16 inputs are too few to start eight.
    ways = (8 if isa.registers == 32 and halves == 1 else 4) // rows
    total = registers(rows * parts, "float32", n)
    part = registers(rows * ways * parts, "float32", n)

    def slot(r: int, way: int, p: int) -> int:
        return ((r * ways + way) * parts + p) * n

    def merged(r: int, p: int) -> Any:
        sums = [load(part, slot(r, way, p), n) for way in range(ways)]
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    def clear() -> None:
        for i in range(rows * ways * parts):
            store(part, i * n, _splat(0.0, "float32", n), n)

    def add(block: Any, half: int = 0) -> None:
        inputs = BLOCK // halves
        at = bind((block * halves + half) * (inputs * 2 * bits))
        for k, values in enumerate(decoder.inputs(at, inputs)):
            column = (block - begin) * BLOCK + half * inputs + k
            for r in range(rows):
                activation = bind(T.broadcast(load(x, ldx * r + column, 1), n))
                for p, value in enumerate(values):
                    i = slot(r, k % ways, p)
                    store(part, i, T.fma(activation, value, load(part, i, n)), n)

    def finish(of: Any) -> None:
        for p in range(parts):
            scales = bind(_scale(mode, scale, of, p, n))
            for r in range(rows):
                i = (r * parts + p) * n
                store(total, i, T.fma(merged(r, p), scales, load(total, i, n)), n)

    for r in range(rows):
        for p in range(parts):
            store(total, (r * parts + p) * n, load(t, ldt * r + p * n, n), n)
    if mode == "pc":
        clear()
        with for_range(begin, end) as block:
            add(block)
        finish(0)
    elif halves > 1 or mode == "e8m0":
        with for_range(begin, end) as block:
            for half in range(halves):
                clear()
                add(block, half)
                finish(block * halves + half)
    else:
        per_group = bind(group // BLOCK)
        with for_range(begin // per_group, (end + per_group - 1) // per_group) as g:
            clear()
            with for_range(tirx.max(begin, g * per_group), tirx.min(end, (g + 1) * per_group)) as block:
                add(block)
            finish(g)
    for r in range(rows):
        for p in range(parts):
            store(t, ldt * r + p * n, load(total, (r * parts + p) * n, n), n)


def _unpack(element: str, mode: str, isa: Isa, *arguments: Any) -> None:
    """out[k, 0:16] = decoded weights of one panel over blocks begin..end; rows of out are 32 floats apart."""
    w, scale, table, begin, end, group, out = arguments
    decoder = _Decoder(element, isa, w, table)
    n, parts, bits = decoder.lanes, decoder.parts, decoder.bits
    per_group = bind(group // BLOCK)
    halves = _halves(mode)
    inputs = BLOCK // halves
    with for_range(begin, end) as block:
        for half in range(halves):
            of = _group_of(mode, block, half, per_group)
            scales = [bind(_scale(mode, scale, of, p, n)) for p in range(parts)]
            at = bind((block * halves + half) * (inputs * 2 * bits))
            for k, values in enumerate(decoder.inputs(at, inputs)):
                row = (block - begin) * BLOCK + half * inputs + k
                for p, value in enumerate(values):
                    store(out, row * 32 + p * n, value * scales[p], n)


def _kernels() -> list[Kernel]:
    kernels = []
    panel = "w: const u8*, scale: const u8*, table: const f32*, begin: i64, end: i64, group: i64"
    for element, mode in VARIANTS:
        name = f"{element}_{mode}"
        for rows in GEMV_ROWS:
            signature = f"x: const f32*, ldx: i64, {panel}, t: f32*, ldt: i64"
            emit = partial(_gemv, element, mode, rows)
            kernels.append(Kernel(f"coded_gemv_{name}_{rows}", signature, emit, "coded"))
        kernels.append(
            Kernel(f"coded_unpack_{name}", f"{panel}, out: f32*", partial(_unpack, element, mode), "coded")
        )
    return kernels


KERNELS = _kernels()
