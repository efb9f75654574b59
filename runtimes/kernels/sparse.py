"""Linears on sparse weights: a bitmask and packed non-zeros (``compiler/dialect/sparse_packing.py``).

Identity: ``t[m, n] = sum_k x[m, k] w[n, k]`` over the k whose bit is set; scales, bias, activation and residual are the
work of the epilogues of linear.py. A *word* is 64 bits of the mask: 64 inputs of one row of weights.

* Few rows of activations (``sparse_gemv_R``, ``sparse8_gemv_R``): the non-zeros of a word are expanded to their
  inputs and multiplied by the R rows' 64 activations; sums over lanes once for each row of weights. v4: ``vexpandps``
  and, with AVX512-VBMI2, ``vpexpandb``. Both depend on the old value of their destination even where they zero it
  (Zen 4: 6.1 instead of 3.0 cycles a step), so they get a register of zeros to overwrite, made from the argument
  ``zero``, which a compiler cannot know to be 0. Without these instructions (``sparse8_gemv_plain_R`` everywhere,
  v3): 8 values at a time by a permutation from a table of 256 (``table``, by ``isofold_sparse_tables`` in
  sparse_driver.h).
* One row of activations and few non-zeros (``sparse_gemv_low``, AVX512-VBMI2): expanding costs the same however few
  non-zeros there are, so instead the places of up to 16 non-zeros of a word are compressed from 0..63 and looked up in
  the word's 64 activations, which stay in registers for 8 rows of weights.
* One row and 8 bits (``sparse8_gemv_1``, ``_low``): four rows of weights share a word's activations in registers.
* bfloat16 (``sparse16_gemv_R``): pairs of values are expanded with ``vpexpandw``. Blocks of four codes
  (``sparse4x8_gemv_R``, layout 1x4) are expanded like floats.

Many rows of activations, and other layouts, are in `sparse_many.py` and beside it.

Sums over 8-bit products are exact in int32 on both instruction sets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .dot import vpdpbusd, vpmaddwd
from .linear import prefetch
from .math import reduce_lanes, shuffle
from .sparse_many import VBMI2, counter, iota64, multiply_add, popcount, splat, widen_bfloat16

KINDS = (
    ("sparse", "float32", ("f32", "f32")),
    ("sparse16", "uint16", ("f32", "u16")),
    ("sparse4x8", "int32", ("i32", "i32")),
)
"""Kernels for few rows whose activations take 4 bytes: name, kind of :func:`_gemv`, types of activations and values."""

GEMV_ROWS = (4, 2, 1)
"""Rows of activations of the kernels that expand."""

WORD = 64

AHEAD = ((2048, 3), (8192, 2))
"""(bytes ahead, cache level) of what float kernels that expand fetch as they stream through values and masks."""

AHEAD8 = ((3072, 3),)
"""The same for 8 bits, where a second level costs more instructions than it saves."""

LINES = 2
"""Cache lines of values fetched for each word (float) or 4 words (8 bits): what half of the weights need."""


def _opaque_zero(zero: Any, dtype: str, lanes: int) -> Any:
    """A vector of zeros that the compiler does not know to be zeros."""
    words = T.broadcast(zero, lanes // 4 if dtype == "int8" else lanes)
    return bind(T.reinterpret(f"{dtype}x{lanes}", words))


def _expand(values: Any, at: Any, bits: Any, nothing: Any, dtype: str, lanes: int) -> Any:
    """The next values where ``bits`` (a vector of booleans) is set, and ``nothing`` elsewhere."""
    kind = {"float32": "f32", "int8": "i8", "int32": "i32"}[dtype]
    address = T.address_of(load(values, at, 1))
    name = f"llvm.masked.expandload.v{lanes}{kind}"
    return bind(T.call_llvm_intrin(f"{dtype}x{lanes}", name, address, bits, nothing))


def _expand_register(packed: Any, bits: Any, nothing: Any, kind: str, dtype: str) -> Any:
    """The same of what is in a register."""
    name = f"llvm.x86.avx512.mask.expand.{kind}"
    return bind(T.call_llvm_pure_intrin(dtype, name, packed, nothing, bits))


def expand8(packed: Any, bits: Any, nothing: Any) -> Any:
    """The same of int8x64."""
    return _expand_register(packed, bits, nothing, "v64i8", "int8x64")


def _low(word: Any, bits: int) -> Any:
    """The lowest bits of a 64-bit word as an unsigned integer."""
    return T.cast(word, f"uint{bits}")


def _fetch(buffer: Any, at: Any, width: int, ahead: tuple[tuple[int, int], ...], lines: int = LINES) -> None:
    for distance, level in ahead:
        for line in range(lines):
            prefetch(buffer, at + (distance + 64 * line) // width, level)


class _Sums:
    """Accumulators of R rows of activations, ``ways`` each."""

    def __init__(self, rows: int, ways: int, dtype: str, lanes: int = 16) -> None:
        self.rows, self.ways, self.dtype, self.lanes = rows, ways, dtype, lanes
        self.data = registers(rows * ways, dtype, lanes)

    def clear(self) -> None:
        for i in range(self.rows * self.ways):
            store(self.data, i * self.lanes, splat(0, self.dtype, self.lanes), self.lanes)

    def update(self, row: int, way: int, change: Any) -> None:
        at = (row * self.ways + way % self.ways) * self.lanes
        store(self.data, at, change(load(self.data, at, self.lanes)), self.lanes)

    def total(self, row: int) -> Any:
        parts = [load(self.data, (row * self.ways + i) * self.lanes, self.lanes) for i in range(self.ways)]
        while len(parts) > 1:
            parts = [bind(a + b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return reduce_lanes(parts[0], lambda a, b: a + b)


def _gemv(rows: int, kind: str, isa: Isa, *arguments: Any) -> None:
    """``t[r, n - begin]`` of the rows ``begin..end`` of weights and R rows of activations ``[R, ldx]``.

    kind: what 4 bytes of activations and a value are: float32 and float32 or uint16 (the bits of a bfloat16), or int32:
    four codes each, whose products are summed.
    """
    x, ldx, mask, words, values, offsets, begin, end, t, ldt, table, zero = arguments
    wide = isa.registers == 32
    lanes = 16 if wide else 8
    dtype = "int32" if kind == "int32" else "float32"
    nothing = _opaque_zero(zero, dtype, lanes) if wide else None
    sums = _Sums(rows, 4 if rows < 4 or not wide else 2, dtype, lanes)
    at = counter()
    size = 2 if kind == "uint16" else 4
    with for_range(begin, end) as n:
        store(at, 0, T.cast(load(offsets, n, 1), "int64"), 1)
        sums.clear()
        with for_range(0, words) as w:
            word = bind(load(mask, n * words + w, 1))
            _fetch(mask, n * words + w, 8, AHEAD, 1)
            _fetch(values, load(at, 0, 1), size, AHEAD)
            for part in range(WORD // lanes):
                offset = bind(load(at, 0, 1))
                bits = bind(_low(word >> T.int64(part * lanes), lanes))
                if wide and kind != "uint16":
                    there = T.reinterpret("uint1x16", bits)
                    weights = _expand(values, offset, there, nothing, dtype, lanes)
                elif wide:
                    packed = widen_bfloat16(load(values, offset, lanes))
                    there = T.reinterpret("uint1x16", bits)
                    weights = _expand_register(packed, there, nothing, "v16f32", "float32x16")
                else:
                    places = bind(load(table, T.cast(bits, "int64") * 8, 8))
                    packed = load(values, offset, 8)
                    if kind == "uint16":
                        packed = widen_bfloat16(packed)
                    name = "llvm.x86.avx2.permd" if kind == "int32" else "llvm.x86.avx2.permps"
                    moved = T.call_llvm_pure_intrin(f"{dtype}x8", name, packed, places)
                    empty = places < splat(0, "int32", 8)
                    weights = bind(T.Select(empty, splat(0, dtype, 8), moved))
                for r in range(rows):
                    found = load(x, ldx * r + w * WORD + part * lanes, lanes)
                    sums.update(r, part, lambda old, v=found, e=weights: multiply_add(isa, kind, old, v, e))
                store(at, 0, offset + popcount(T.cast(bits, "int64")), 1)
        for r in range(rows):
            store(t, ldt * r + n - begin, sums.total(r), 1)


def _gemv16(rows: int, isa: Isa, *arguments: Any) -> None:
    """The same on bfloat16 with ``vpexpandw``, 32 values at a time: of every 32 activations ``x`` has those of even
    inputs first, so that a shift and a mask make float32 of the two halves of each 4 bytes."""
    if not isa.vnni:
        _gemv(rows, "uint16", isa, *arguments)
        return
    x, ldx, mask, words, values, offsets, begin, end, t, ldt, _, zero = arguments
    nothing = bind(T.reinterpret("int16x32", T.broadcast(zero, 16)))
    sums = _Sums(rows, 4 if rows < 4 else 2, "float32")
    at = counter()
    with for_range(begin, end) as n:
        store(at, 0, T.cast(load(offsets, n, 1), "int64"), 1)
        sums.clear()
        with for_range(0, words) as w:
            word = bind(load(mask, n * words + w, 1))
            _fetch(mask, n * words + w, 8, AHEAD, 1)
            _fetch(values, load(at, 0, 1), 2, AHEAD)
            for part in range(2):
                offset = bind(load(at, 0, 1))
                bits = bind(_low(word >> T.int64(part * 32), 32))
                packed = T.reinterpret("int16x32", load(values, offset, 32))
                there = T.reinterpret("uint1x32", bits)
                both = _expand_register(packed, there, nothing, "v32i16", "int16x32")
                both = bind(T.reinterpret("uint32x16", both))
                even = bind(T.reinterpret("float32x16", both << splat(16, "uint32", 16)))
                odd = bind(T.reinterpret("float32x16", both & splat(0xFFFF0000, "uint32", 16)))
                for r in range(rows):
                    for half, weights in enumerate((even, odd)):
                        found = load(x, ldx * r + w * WORD + part * 32 + half * 16)
                        sums.update(r, 2 * part + half, lambda old, v=found, e=weights: T.fma(v, e, old))
                store(at, 0, offset + popcount(T.cast(bits, "int64")), 1)
        for r in range(rows):
            store(t, ldt * r + n - begin, sums.total(r), 1)


def _gemv8(rows: int, isa: Isa, *arguments: Any) -> None:
    """The same on 8-bit activations and weights, with ``vpexpandb``; v3: :func:`_gemv8_plain`."""
    if not isa.vnni:
        _gemv8_plain(rows, isa, *arguments)
        return
    x, ldx, mask, words, values, offsets, begin, end, t, ldt, _, zero = arguments
    nothing = _opaque_zero(zero, "int8", 64)
    unroll = 4
    sums = _Sums(rows, 4 if rows < 4 else 2, "int32")
    at = counter()

    def step(n: Any, w: Any, way: int) -> None:
        word = bind(load(mask, n * words + w, 1))
        offset = bind(load(at, 0, 1))
        weights = _expand(values, offset, T.reinterpret("uint1x64", word), nothing, "int8", 64)
        for r in range(rows):
            codes = T.reinterpret("int32x16", load(x, ldx * r + w * WORD, 64))
            sums.update(r, way, lambda old, u=codes, e=weights: vpdpbusd(old, u, e))
        store(at, 0, offset + popcount(word), 1)

    with for_range(begin, end) as n:
        store(at, 0, T.cast(load(offsets, n, 1), "int64"), 1)
        sums.clear()
        with for_range(0, words // unroll) as block:
            _fetch(mask, n * words + block * unroll, 8, AHEAD8, 1)
            _fetch(values, load(at, 0, 1), 1, AHEAD8)
            for i in range(unroll):
                step(n, block * unroll + i, i)
        with for_range(words // unroll * unroll, words) as w:
            step(n, w, 0)
        for r in range(rows):
            store(t, ldt * r + n - begin, sums.total(r), 1)


def _gemv8_plain(rows: int, isa: Isa, *arguments: Any) -> None:
    """The same with ``pshufb``: 16 inputs at a time as two tables of 8, widened to 16 bits for ``vpmaddwd``."""
    x, ldx, mask, words, values, offsets, begin, end, t, ldt, table, _ = arguments
    sums = _Sums(rows, 2, "int32", 8)
    at = counter()
    with for_range(begin, end) as n:
        store(at, 0, T.cast(load(offsets, n, 1), "int64"), 1)
        sums.clear()
        with for_range(0, words) as w:
            word = bind(load(mask, n * words + w, 1))
            _fetch(values, load(at, 0, 1), 1, AHEAD8, 1)
            for part in range(WORD // 16):
                halves = []
                for half in range(2):
                    bits = bind(T.cast(_low(word >> T.int64(part * 16 + half * 8), 8), "int64"))
                    offset = bind(load(at, 0, 1))
                    places = load(table, (bits + half * 256) * 16, 16)
                    packed = load(values, offset, 16)
                    name = "llvm.x86.ssse3.pshuf.b.128"
                    moved = T.call_llvm_pure_intrin("int8x16", name, packed, T.reinterpret("int8x16", places))
                    halves.append(bind(moved))
                    store(at, 0, offset + popcount(bits), 1)
                weights = bind(T.cast(halves[0] | halves[1], "int16x16"))
                for r in range(rows):
                    codes = T.cast(load(x, ldx * r + w * WORD + part * 16, 16), "int16x16")
                    sums.update(r, part, lambda old, u=codes, e=weights: old + vpmaddwd(u, e))
        for r in range(rows):
            store(t, ldt * r + n - begin, sums.total(r), 1)


SHARED = 4
"""Rows of weights that share one word's activations in registers; ``end - begin`` is a multiple of it."""


def _gemv8_shared(half: bool, isa: Isa, *arguments: Any) -> None:
    """``sparse8_gemv_1`` for SHARED rows of weights at once: a word's activations are loaded once for all of them.

    Zen 5 loads twice a cycle, and what crosses a cache line counts twice: of 2.7 cycles a word 0.7 were the
    activations. ``half``: words of which most have at most 32 non-zeros, so that half a line is loaded and crosses
    less often.
    """
    if not isa.vnni:
        _gemv8_plain(1, isa, *arguments[:-1])
        return
    x, _, mask, words, values, offsets, begin, end, t, _, _, zero, again = arguments
    nothing = _opaque_zero(zero, "int8", 64)
    sums = _Sums(SHARED, 1, "int32")
    at = registers(SHARED, "int64", 1)
    with for_range(0, (end - begin) // SHARED) as block:
        first = bind(begin + block * SHARED)
        sums.clear()
        for i in range(SHARED):
            store(at, i, T.cast(load(offsets, first + i, 1), "int64"), 1)
        next_ = bind(T.cast(load(offsets, first + SHARED, 1), "int64"))
        pace = bind((next_ - load(at, 0, 1)) // words)
        behind = bind(next_ * 2 - load(at, 0, 1))  # about where the rows after the next ones begin
        with for_range(0, words) as w:
            prefetch(mask, (first + 2 * SHARED) * words + w * SHARED, 3)
            for line in range(2 if half else 3):
                prefetch(values, behind + w * pace + 64 * line, 3)
            codes = bind(T.reinterpret("int32x16", load(x, w * WORD, 64)))
            for i in range(SHARED):
                word = bind(load(mask, (first + i) * words + w, 1))
                offset = bind(load(at, i, 1))
                count = bind(popcount(word))
                bits = bind(T.reinterpret("uint1x64", load(again, (first + i) * words + w, 1)))

                def add(i: int = i, offset: Any = offset, bits: Any = bits, lanes: int = 64) -> None:
                    packed = load(values, offset, lanes)
                    if lanes == 32:
                        packed = shuffle(packed, splat(0, "int8", 32), range(64))
                    weights = expand8(packed, bits, nothing)
                    sums.update(i, 0, lambda old: vpdpbusd(old, codes, weights))

                if half:
                    with T.If(count > T.int64(32)):
                        with T.Then():
                            add()
                        with T.Else():
                            add(lanes=32)
                else:
                    add()
                store(at, i, offset + count, 1)
        for i in range(SHARED):
            store(t, block * SHARED + i, sums.total(i), 1)


LOW_ROWS = 8
"""Rows of weights of the kernel for few non-zeros; ``end - begin`` is a multiple of it."""


def _gemv_low(isa: Isa, *arguments: Any) -> None:
    """``sparse_gemv_1`` for words of which most have at most 16 non-zeros."""
    if not isa.vnni:
        _gemv(1, "float32", isa, *arguments)
        return
    x, _, mask, words, values, offsets, begin, end, t, _, _, zero = arguments
    places_of_all = bind(iota64())
    nothing = _opaque_zero(zero, "int8", 64)
    sums = _Sums(LOW_ROWS, 1, "float32")
    at = registers(LOW_ROWS, "int64", 1)
    with for_range(0, (end - begin) // LOW_ROWS) as block:
        first = bind(begin + block * LOW_ROWS)
        sums.clear()
        for i in range(LOW_ROWS):
            store(at, i, T.cast(load(offsets, first + i, 1), "int64"), 1)
        # What the next rows need is as far ahead as these are long.
        ahead = bind(T.cast(load(offsets, first + LOW_ROWS, 1), "int64") - load(at, 0, 1))
        with for_range(0, words) as w:
            prefetch(mask, (first + LOW_ROWS) * words + w * LOW_ROWS, 3)
            tables = [bind(load(x, w * WORD + 16 * i)) for i in range(4)]
            for i in range(LOW_ROWS):
                word = bind(load(mask, (first + i) * words + w, 1))
                offset = bind(load(at, i, 1))
                prefetch(values, offset + ahead, 3)
                count = bind(popcount(word))
                name = "llvm.x86.avx512.mask.compress.v64i8"
                bits = T.reinterpret("uint1x64", word)
                places = bind(T.call_llvm_pure_intrin("int8x64", name, places_of_all, nothing, bits))

                def add(
                    from_: int, i: int = i, places: Any = places, offset: Any = offset, count: Any = count
                ) -> None:
                    """Non-zeros ``from_ .. from_ + 15`` of the word."""
                    lanes = [tirx.const(from_ + j, "int32") for j in range(16)]
                    index = bind(T.cast(tirx.Shuffle([places], lanes), "int32x16"))
                    name = "llvm.x86.avx512.vpermi2var.ps.512"
                    low, high = (
                        T.call_llvm_pure_intrin("float32x16", name, tables[j], index, tables[j + 1])
                        for j in (0, 2)
                    )
                    activations = T.Select(index < splat(32, "int32", 16), low, high)
                    order = T.ramp(tirx.const(from_, "int32"), tirx.const(1, "int32"), 16)
                    inside = order < T.broadcast(T.cast(count, "int32"), 16)
                    packed = T.Select(inside, load(values, offset + from_), splat(0, "float32", 16))
                    sums.update(i, 0, lambda old: T.fma(activations, packed, old))

                add(0)
                with when(count > T.int64(16)):
                    for from_ in (16, 32, 48):
                        with when(count > T.int64(from_)):
                            add(from_)
                store(at, i, offset + count, 1)
        for i in range(LOW_ROWS):
            store(t, block * LOW_ROWS + i, sums.total(i), 1)


def _kernels() -> list[Kernel]:
    kernels = []
    tail = "offsets: const i32*, begin: i64, end: i64"
    for rows in GEMV_ROWS:
        for name, kind, c in KINDS:
            head = f"x: const {c[0]}*, ldx: i64, mask: const i64*, words: i64, values: const {c[1]}*"
            signature = f"{head}, {tail}, t: {c[0]}*, ldt: i64, table: const i32*, zero: i32"
            plain = "_plain" if kind == "uint16" else ""
            kernels.append(
                Kernel(f"{name}_gemv{plain}_{rows}", signature, partial(_gemv, rows, kind), "sparse")
            )
            if kind == "float32" and rows == 1:
                kernels.append(
                    Kernel("sparse_gemv_low", signature, _gemv_low, "sparse_vbmi2", attributes=VBMI2)
                )
            if kind == "uint16":
                emit = partial(_gemv16, rows)
                kernels.append(
                    Kernel(f"{name}_gemv_{rows}", signature, emit, "sparse_vbmi2", attributes=VBMI2)
                )
        head = "x: const u8*, ldx: i64, mask: const i64*, words: i64, values: const i8*"
        signature = f"{head}, {tail}, t: i32*, ldt: i64, table: const u8*, zero: i32"
        emits = {f"sparse8_gemv_{rows}": partial(_gemv8, rows)}
        if rows == 1:
            emits = {f"sparse8_gemv_{n}": partial(_gemv8_shared, n == "low") for n in ("1", "low")}
        for name, emit in emits.items():
            kernels.append(
                Kernel(
                    name,
                    signature + (", again: const i64*" if rows == 1 else ""),
                    emit,
                    "sparse_vbmi2",
                    attributes=VBMI2,
                )
            )
        kernels.append(Kernel(f"sparse8_gemv_plain_{rows}", signature, partial(_gemv8_plain, rows), "sparse"))
    return kernels


KERNELS = _kernels()
