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
* Many rows (``sparse_gemm_V``, ``sparse8_gemm``): activations lie transposed, ``xt[k, 16 V]`` (8 bits: ``[k, 64]``), so
  that one non-zero meets 16 V of them in V multiply-adds. Zeros cost nothing. 8 bits: four non-zeros of a row at a
  time; their four rows of 64 activations are interleaved byte by byte to operands of ``vpdpbusd`` (v3: pairs for
  ``vpmaddwd``). The places of the non-zeros are written out first (``sparse8_list``), once for all rows of activations.

Sums over 8-bit products are exact in int32 on both instruction sets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .dot import vpdpbusd, vpmaddwd
from .linear import prefetch
from .math import reduce_lanes, shuffle, transpose16

GEMV_ROWS = (4, 2, 1)
"""Rows of activations of the kernels that expand."""

GEMM_VECTORS = (4, 2, 1)
"""Vectors of 16 rows of activations of the float kernels for many rows."""

GEMM8_ROWS = 64
"""Rows of activations of the 8-bit kernels for many rows."""

WORD = 64

AHEAD = ((2048, 3), (8192, 2))
"""(bytes ahead, cache level) of what float kernels that expand fetch as they stream through values and masks."""

AHEAD8 = ((3072, 3),)
"""The same for 8 bits, where a second level costs more instructions than it saves."""

LINES = 2
"""Cache lines of values fetched for each word (float) or 4 words (8 bits): what half of the weights need."""

VBMI2 = ("+avx512vbmi", "+avx512vbmi2", "+avx512bitalg", "+avx512vpopcntdq")
"""What every processor with AVX512-VBMI2 has; the library looks for all four before it uses these kernels."""


def _splat(value: float, dtype: str, lanes: int) -> Any:
    return T.broadcast(tirx.const(value, dtype), lanes)


def _opaque_zero(zero: Any, dtype: str, lanes: int) -> Any:
    """A vector of zeros that the compiler does not know to be zeros."""
    words = T.broadcast(zero, lanes if dtype == "float32" else lanes // 4)
    return bind(T.reinterpret(f"{dtype}x{lanes}", words))


def _expand(values: Any, at: Any, bits: Any, nothing: Any, dtype: str, lanes: int) -> Any:
    """The next values where ``bits`` (a vector of booleans) is set, and ``nothing`` elsewhere."""
    kind = {"float32": "f32", "int8": "i8"}[dtype]
    address = T.address_of(load(values, at, 1))
    name = f"llvm.masked.expandload.v{lanes}{kind}"
    return bind(T.call_llvm_intrin(f"{dtype}x{lanes}", name, address, bits, nothing))


def _low(word: Any, bits: int) -> Any:
    """The lowest bits of a 64-bit word as an unsigned integer."""
    return T.cast(word, f"uint{bits}")


def _counter() -> Any:
    """An int64 variable."""
    return registers(1, "int64", 1)


def _popcount(word: Any) -> Any:
    return T.cast(T.popcount(word), "int64")


def _first(word: Any) -> Any:
    """The index of the lowest set bit of a word that has one."""
    return T.call_llvm_pure_intrin("int64", "llvm.cttz.i64", word, tirx.const(1, "uint1"))


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
            store(self.data, i * self.lanes, _splat(0, self.dtype, self.lanes), self.lanes)

    def update(self, row: int, way: int, change: Any) -> None:
        at = (row * self.ways + way % self.ways) * self.lanes
        store(self.data, at, change(load(self.data, at, self.lanes)), self.lanes)

    def total(self, row: int) -> Any:
        parts = [load(self.data, (row * self.ways + i) * self.lanes, self.lanes) for i in range(self.ways)]
        while len(parts) > 1:
            parts = [bind(a + b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return reduce_lanes(parts[0], lambda a, b: a + b)


def _gemv(rows: int, isa: Isa, *arguments: Any) -> None:
    """``t[r, n - begin]`` of the rows ``begin..end`` of weights and R rows of activations ``[R, ldx]``, float."""
    x, ldx, mask, words, values, offsets, begin, end, t, ldt, table, zero = arguments
    wide = isa.registers == 32
    lanes = 16 if wide else 8
    nothing = _opaque_zero(zero, "float32", lanes) if wide else None
    sums = _Sums(rows, 4 if rows < 4 or not wide else 2, "float32", lanes)
    at = _counter()
    with for_range(begin, end) as n:
        store(at, 0, T.cast(load(offsets, n, 1), "int64"), 1)
        sums.clear()
        with for_range(0, words) as w:
            word = bind(load(mask, n * words + w, 1))
            _fetch(mask, n * words + w, 8, AHEAD, 1)
            _fetch(values, load(at, 0, 1), 4, AHEAD)
            for part in range(WORD // lanes):
                offset = bind(load(at, 0, 1))
                bits = bind(_low(word >> T.int64(part * lanes), lanes))
                if wide:
                    weights = _expand(
                        values, offset, T.reinterpret("uint1x16", bits), nothing, "float32", lanes
                    )
                else:
                    places = bind(load(table, T.cast(bits, "int64") * 8, 8))
                    packed = load(values, offset, 8)
                    moved = T.call_llvm_pure_intrin("float32x8", "llvm.x86.avx2.permps", packed, places)
                    empty = places < _splat(0, "int32", 8)
                    weights = bind(T.Select(empty, _splat(0, "float32", 8), moved))
                for r in range(rows):
                    values_of_x = load(x, ldx * r + w * WORD + part * lanes, lanes)
                    sums.update(r, part, lambda old, v=values_of_x, e=weights: T.fma(v, e, old))
                store(at, 0, offset + _popcount(T.cast(bits, "int64")), 1)
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
    at = _counter()

    def step(n: Any, w: Any, way: int) -> None:
        word = bind(load(mask, n * words + w, 1))
        offset = bind(load(at, 0, 1))
        weights = _expand(values, offset, T.reinterpret("uint1x64", word), nothing, "int8", 64)
        for r in range(rows):
            codes = T.reinterpret("int32x16", load(x, ldx * r + w * WORD, 64))
            sums.update(r, way, lambda old, u=codes, e=weights: vpdpbusd(old, u, e))
        store(at, 0, offset + _popcount(word), 1)

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
    at = _counter()
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
                    store(at, 0, offset + _popcount(bits), 1)
                weights = bind(T.cast(halves[0] | halves[1], "int16x16"))
                for r in range(rows):
                    codes = T.cast(load(x, ldx * r + w * WORD + part * 16, 16), "int16x16")
                    sums.update(r, part, lambda old, u=codes, e=weights: old + vpmaddwd(u, e))
        for r in range(rows):
            store(t, ldt * r + n - begin, sums.total(r), 1)


LOW_ROWS = 8
"""Rows of weights of the kernel for few non-zeros; ``end - begin`` is a multiple of it."""


def _gemv_low(isa: Isa, *arguments: Any) -> None:
    """``sparse_gemv_1`` for words of which most have at most 16 non-zeros."""
    if not isa.vnni:
        _gemv(1, isa, *arguments)
        return
    x, _, mask, words, values, offsets, begin, end, t, _, _, zero = arguments
    places_of_all = bind(_iota64())
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
                count = bind(_popcount(word))
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
                    activations = T.Select(index < _splat(32, "int32", 16), low, high)
                    order = T.ramp(tirx.const(from_, "int32"), tirx.const(1, "int32"), 16)
                    inside = order < T.broadcast(T.cast(count, "int32"), 16)
                    packed = T.Select(inside, load(values, offset + from_), _splat(0, "float32", 16))
                    sums.update(i, 0, lambda old: T.fma(activations, packed, old))

                add(0)
                with when(count > T.int64(16)):
                    for from_ in (16, 32, 48):
                        with when(count > T.int64(from_)):
                            add(from_)
                store(at, i, offset + count, 1)
        for i in range(LOW_ROWS):
            store(t, block * LOW_ROWS + i, sums.total(i), 1)


def _iota64() -> Any:
    """0..63 as int8x64."""
    words = T.ramp(tirx.const(0x03020100, "int32"), tirx.const(0x04040404, "int32"), 16)
    return T.reinterpret("int8x64", words)


def _gemm(vectors: int, isa: Isa, *arguments: Any) -> None:
    """``acc[r, 16 V] += w[r, :] xt`` for ``rows`` rows of weights and ``words`` words of each; ``at`` moves on."""
    xt, mask, ldmask, words, values, rows, at, acc = arguments
    width = 16 * vectors
    with for_range(0, rows) as r:
        sums = registers(vectors, "float32")
        for v in range(vectors):
            store(sums, v * 16, load(acc, r * width + v * 16))
        position, left = _counter(), _counter()
        start = bind(load(at, r, 1))
        store(position, 0, start, 1)
        for line in range(4):  # the row's next chunk: rows of a chunk lie too far apart for the hardware
            prefetch(values, start + words * (WORD // 4) + 16 * line, 3)
        prefetch(mask, r * ldmask + words, 3)
        with for_range(0, words) as w:
            word = bind(load(mask, r * ldmask + w, 1))
            store(left, 0, word, 1)
            base = bind(load(position, 0, 1))
            count = bind(_popcount(word))
            with for_range(0, count) as i:
                rest = bind(load(left, 0, 1))
                k = bind((w * WORD + _first(rest)) * width)
                weight = bind(T.broadcast(load(values, base + i, 1), 16))
                for v in range(vectors):
                    store(sums, v * 16, T.fma(weight, load(xt, k + v * 16), load(sums, v * 16)))
                store(left, 0, rest & (rest - T.int64(1)), 1)
            store(position, 0, base + count, 1)
        store(at, r, load(position, 0, 1), 1)
        for v in range(vectors):
            store(acc, r * width + v * 16, load(sums, v * 16))


def _list8(compressed: bool, isa: Isa, *arguments: Any) -> None:
    """Where the activations of the non-zeros of ``rows`` rows of weights start: ``out[r, i] = 64 k`` for the i-th of
    ``counts[r]``, then 4 zeros. At most 16 words, so that 64 k fits 16 bits; ``ldout`` is at least 64 ``words`` + 64.
    """
    mask, ldmask, words, rows, out, ldout, counts = arguments
    wide = compressed and isa.vnni
    places_of_all = bind(_iota64()) if wide else None
    with for_range(0, rows) as r:
        position, left = _counter(), _counter()
        store(position, 0, T.int64(0), 1)
        prefetch(mask, r * ldmask + words, 3)
        with for_range(0, words) as w:
            word = bind(load(mask, r * ldmask + w, 1))
            base = bind(load(position, 0, 1))
            count = bind(_popcount(word))
            to = bind(r * ldout + base)
            if wide:
                name = "llvm.x86.avx512.mask.compress.v64i8"
                bits = T.reinterpret("uint1x64", word)
                nothing = _splat(0, "int8", 64)
                places = bind(T.call_llvm_pure_intrin("int8x64", name, places_of_all, nothing, bits))
                first = bind(T.broadcast(T.cast(w * WORD, "uint16"), 32))

                def write(half: int, places: Any = places, first: Any = first, to: Any = to) -> None:
                    lanes = [tirx.const(32 * half + j, "int32") for j in range(32)]
                    index = T.cast(T.reinterpret("uint8x32", tirx.Shuffle([places], lanes)), "uint16x32")
                    store(out, to + 32 * half, (index + first) << _splat(6, "uint16", 32), 32)

                write(0)
                with when(count > T.int64(32)):
                    write(1)
            else:
                store(left, 0, word, 1)
                with for_range(0, count) as i:
                    rest = bind(load(left, 0, 1))
                    store(out, to + i, T.cast((w * WORD + _first(rest)) * GEMM8_ROWS, "uint16"), 1)
                    store(left, 0, rest & (rest - T.int64(1)), 1)
            store(position, 0, base + count, 1)
        end = bind(load(position, 0, 1))
        store(out, r * ldout + end, _splat(0, "uint16", 4), 4)
        store(counts, r, end, 1)


def _place8(isa: Isa, vector: int, lane: int) -> int:
    """Which row of activations a lane of the 8-bit sums belongs to: interleaving works inside 128 bits."""
    if isa.vnni:
        return 16 * (lane // 4) + 4 * vector + lane % 4
    return 16 * vector + (lane % 4) + 8 * (lane // 4 % 2) + 4 * (lane // 8)


def _interleave(isa: Isa, rows: list[Any]) -> list[Any]:
    """Four rows of 64 bytes to four vectors of 16 times 4 bytes, in the order of :func:`_place8`."""

    def unpack(a: Any, b: Any, unit: int, high: bool) -> Any:
        """Units of bytes of a and b by turns, from the low or the high half of every 16 bytes."""
        lanes, half = 16 // unit, 8 // unit
        index = []
        for chunk in range(4):
            for j in range(half):
                from_ = chunk * lanes + j + (half if high else 0)
                index += [from_, from_ + 64 // unit]
        return bind(shuffle(a, b, index))

    low, high = ([unpack(rows[i], rows[i + 1], 1, h) for i in (0, 2)] for h in (False, True))
    quads = []
    for pairs in (low, high):
        a, b = (bind(T.reinterpret("int16x32", v)) for v in pairs)
        quads += [unpack(a, b, 2, h) for h in (False, True)]
    return quads


def _gemm8(isa: Isa, *arguments: Any) -> None:
    """``acc[r, 64] += w[r, :] xt`` over the listed non-zeros of ``rows`` rows of weights, four at a time."""
    xt, places, ldplaces, counts, values, at, rows, acc = arguments
    vectors = 4 if isa.vnni else 8
    lanes = 16 if isa.vnni else 8
    with for_range(0, rows) as r:
        sums = registers(vectors, "int32", lanes)
        for v in range(vectors):
            store(sums, v * lanes, load(acc, r * GEMM8_ROWS + v * lanes, lanes), lanes)
        base = bind(load(at, r, 1))
        count = bind(load(counts, r, 1))
        list_ = bind(r * ldplaces)
        for line in range(3):  # the row's next chunk: rows of a chunk lie too far apart for the hardware
            prefetch(values, base + count + 64 * line, 3)

        def four(g: Any, keep: Any = None, base: Any = base, list_: Any = list_, sums: Any = sums) -> None:
            """Non-zeros 4 g .. 4 g + 3; ``keep`` masks what belongs to others."""
            first = bind(base + g * 4)
            weights = T.reinterpret("int32", load(values, first, 4))
            weights = bind(weights if keep is None else weights & keep)
            # One load and shifts: four loads become a vector, and taking that apart costs more than the dots.
            quad = bind(T.reinterpret("int64", load(places, list_ + g * 4, 4)))
            offsets = [bind(quad >> T.int64(16 * j) & T.int64(0xFFFF)) for j in range(4)]
            if isa.vnni:
                broadcast = bind(T.reinterpret("int8x64", T.broadcast(weights, 16)))
                loaded = [bind(load(xt, o, 64)) for o in offsets]
                for v, quad in enumerate(_interleave(isa, loaded)):
                    old = load(sums, v * 16)
                    store(sums, v * 16, vpdpbusd(old, T.reinterpret("int32x16", quad), broadcast))
                return
            for pair in range(2):
                low = (weights << T.int32(24 - 16 * pair)) >> T.int32(24)
                high = (weights << T.int32(16 - 16 * pair)) >> T.int32(24)
                both = (low & T.int32(0xFFFF)) | (high << T.int32(16))
                factor = bind(T.reinterpret("int16x16", T.broadcast(both, 8)))
                for block in range(4):
                    a, b = (
                        bind(T.cast(load(xt, offsets[2 * pair + j] + 16 * block, 16), "int16x16"))
                        for j in range(2)
                    )
                    for half in range(2):
                        index = []
                        for chunk in range(2):
                            for j in range(4):
                                from_ = 8 * chunk + 4 * half + j
                                index += [from_, from_ + 16]
                        i = (2 * block + half) * 8
                        product = vpmaddwd(bind(shuffle(a, b, index)), factor)
                        store(sums, i, load(sums, i, 8) + product, 8)

        with for_range(0, count // 4) as g:
            four(g)
        left = bind(count % 4)
        with when(left > T.int64(0)):
            four(count // 4, (T.int32(1) << T.cast(left * 8, "int32")) - T.int32(1))
        for v in range(vectors):
            store(acc, r * GEMM8_ROWS + v * lanes, load(sums, v * lanes, lanes), lanes)


def _transpose(dtype: str, isa: Isa, *arguments: Any) -> None:
    """``xt[k, width]`` from rows ``x[m, ldx]``, k from ``begin`` to ``end``; rows behind the last repeat it."""
    x, ldx, rows, width, begin, end, xt = arguments
    lanes = 16

    def source(m: Any) -> Any:
        return T.min(m, rows - T.int64(1)) * ldx

    whole = bind((end - begin) // lanes)
    with for_range(0, whole) as block, for_range(0, width // lanes) as part:
        k = bind(begin + block * lanes)
        vectors = [bind(load(x, source(part * lanes + i) + k, lanes)) for i in range(lanes)]
        for i, vector in enumerate(transpose16(vectors)):
            store(xt, (k + i) * width + part * lanes, vector, lanes)
    with for_range(begin + whole * lanes, end) as k, for_range(0, width) as m:
        store(xt, k * width + m, load(x, source(m) + k, 1), 1)


def _turn(vectors: int, dtype: str, isa: Isa, acc: Any, t: Any) -> None:
    """``t[m, 32]`` from ``acc[32, 16 V]``."""
    width = 16 * vectors
    for half in range(2):
        for v in range(vectors):
            rows = [bind(load(acc, (half * 16 + i) * width + v * 16)) for i in range(16)]
            for lane, column in enumerate(transpose16(rows)):
                m = v * 16 + lane if dtype == "float32" else _place8(isa, v, lane)
                store(t, m * 32 + half * 16, column)


def _kernels() -> list[Kernel]:
    kernels = []
    tail = "offsets: const i32*, begin: i64, end: i64"
    for rows in GEMV_ROWS:
        head = "x: const f32*, ldx: i64, mask: const i64*, words: i64, values: const f32*"
        signature = f"{head}, {tail}, t: f32*, ldt: i64, table: const i32*, zero: i32"
        kernels.append(Kernel(f"sparse_gemv_{rows}", signature, partial(_gemv, rows), "sparse"))
        if rows == 1:
            kernels.append(Kernel("sparse_gemv_low", signature, _gemv_low, "sparse_vbmi2", attributes=VBMI2))
        head = "x: const u8*, ldx: i64, mask: const i64*, words: i64, values: const i8*"
        signature = f"{head}, {tail}, t: i32*, ldt: i64, table: const u8*, zero: i32"
        emit = partial(_gemv8, rows)
        kernels.append(Kernel(f"sparse8_gemv_{rows}", signature, emit, "sparse_vbmi2", attributes=VBMI2))
        kernels.append(Kernel(f"sparse8_gemv_plain_{rows}", signature, partial(_gemv8_plain, rows), "sparse"))
    for vectors in GEMM_VECTORS:
        signature = "xt: const f32*, mask: const i64*, ldmask: i64, words: i64, values: const f32*"
        signature += ", rows: i64, at: i64*, acc: f32*"
        kernels.append(Kernel(f"sparse_gemm_{vectors}", signature, partial(_gemm, vectors), "sparse_many"))
        emit = partial(_turn, vectors, "float32")
        kernels.append(Kernel(f"sparse_turn_{vectors}", "acc: const f32*, t: f32*", emit, "sparse_many"))
    signature = "mask: const i64*, ldmask: i64, words: i64, rows: i64, out: u16*, ldout: i64, counts: i64*"
    kernels.append(Kernel("sparse8_list", signature, partial(_list8, True), "sparse_vbmi2", attributes=VBMI2))
    kernels.append(Kernel("sparse8_list_plain", signature, partial(_list8, False), "sparse_many"))
    signature = "xt: const u8*, places: const u16*, ldplaces: i64, counts: const i64*, values: const i8*"
    signature += ", at: const i64*, rows: i64, acc: i32*"
    kernels.append(Kernel("sparse8_gemm", signature, _gemm8, "sparse_many"))
    emit = partial(_turn, GEMM8_ROWS // 16, "int32")
    kernels.append(Kernel("sparse8_turn", "acc: const i32*, t: i32*", emit, "sparse_many"))
    tail = "ldx: i64, rows: i64, width: i64, begin: i64, end: i64"
    for name, kind, dtype in (("sparse_transpose", "f32", "float32"), ("sparse8_transpose", "u8", "uint8")):
        signature = f"x: const {kind}*, {tail}, xt: {kind}*"
        kernels.append(Kernel(name, signature, partial(_transpose, dtype), "sparse_many"))
    return kernels


KERNELS = _kernels()
