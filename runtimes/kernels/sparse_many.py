"""Linears on sparse weights against many rows of activations: one pair of kernels for every encoding.

Identity: ``acc[r, m] += sum_i value[r, i] x[m, k[r, i]]`` over the non-zeros of a chunk of K. An encoding brings a
``*_list`` kernel that writes where the non-zeros of some rows of weights stand and what they are; the rest is here:

* Activations lie transposed, ``xt[k, width]`` (``sparse_transpose``), so that one non-zero meets `width` of them in
  vectors; products with zero cost nothing. A list is written once for all rows of activations.
* ``sparse_gemm_V``: a non-zero is broadcast to V multiply-adds of 16 rows. Neighbouring non-zeros add to different sums
  (a multiply-add waits 4 cycles for the one in front of it).
* ``sparse8_gemm_V``: four non-zeros of a row at a time; their four rows of activations are interleaved byte by byte to
  operands of ``vpdpbusd`` (v3: pairs for ``vpmaddwd``). 64 rows and 4 non-zeros are 8 shuffles and 4 dot products: Zen
  4 shuffles twice a cycle, Zen 5 starts 3.65 of both together (3.5 cycles measured in long rows of 128).

A *place* is 64 k (uint16: a chunk has at most 1,023 inputs). Lists end with zero values, so that kernels take whole
steps of non-zeros. Sums over 8-bit products are exact in int32 on both instruction sets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .dot import split_activation, split_weight, vpdpbusd, vpmaddwd
from .linear import prefetch
from .math import lanes_of, reduce_lanes, shuffle, transpose16

GEMM_VECTORS = (4, 2, 1)
"""Vectors of 16 rows of activations of the float kernels."""

GEMM8_VECTORS = (8, 4)
"""The same of the 8-bit kernels; 8 of them share the work on lists and weights."""

STEP = 4
"""Non-zeros that lists are padded to a multiple of."""

ROWS_AHEAD = 8
"""Rows of weights ahead whose 8-bit values a list fetches into the first-level cache (of floats nothing is gained)."""

PLACE = 64
"""Of one input; what a kernel's rows of activations occupy is a multiple of it in bytes."""

WORD = 64

VBMI2 = ("+avx512vbmi", "+avx512vbmi2", "+avx512bitalg", "+avx512vpopcntdq")
"""What every processor with AVX512-VBMI2 has; the library looks for all four before it uses these kernels."""


def splat(value: float, dtype: str, lanes: int) -> Any:
    """A constant vector."""
    return T.broadcast(tirx.const(value, dtype), lanes)


def counter() -> Any:
    """An int64 variable."""
    return registers(1, "int64", 1)


def popcount(word: Any) -> Any:
    """Ones of a word, int64."""
    return T.cast(T.popcount(word), "int64")


def first_bit(word: Any) -> Any:
    """The index of the lowest set bit of a word that has one."""
    return T.call_llvm_pure_intrin("int64", "llvm.cttz.i64", word, tirx.const(1, "uint1"))


def iota64() -> Any:
    """0..63 as int8x64."""
    words = T.ramp(tirx.const(0x03020100, "int32"), tirx.const(0x04040404, "int32"), 16)
    return T.reinterpret("int8x64", words)


def compress_places(places_of_all: Any, word: Any, nothing: Any) -> Any:
    """The indices of the set bits of a word, int8x64, ``nothing`` behind them."""
    bits = T.reinterpret("uint1x64", word)
    name = "llvm.x86.avx512.mask.compress.v64i8"
    return bind(T.call_llvm_pure_intrin("int8x64", name, places_of_all, nothing, bits))


def _list(dtype: str, compressed: bool, isa: Isa, *arguments: Any) -> None:
    """Bitmask: ``out[r, i] = 64 k`` and ``copy[r, i]``, the value, for the non-zeros of ``words`` words of ``rows``
    rows of weights, then zeros up to ``counts[r]``, a multiple of STEP; ``at[r]``, the row's place in values, moves
    on.
    """
    mask, ldmask, words, rows, values, at, out, copy, ldout, counts = arguments
    wide = compressed and isa.vnni
    places_of_all = bind(iota64()) if wide else None
    with for_range(0, rows) as r:
        position, left = counter(), counter()
        store(position, 0, T.int64(0), 1)
        prefetch(mask, r * ldmask + words, 3)
        if dtype.startswith("int"):
            # Values were asked for a chunk ago, and the products since have pushed them out of the first-level cache.
            soon = bind(load(at, T.min(r + ROWS_AHEAD, rows - T.int64(1)), 1))
            for value in (0, _unconditional(dtype) - 1):
                prefetch(values, soon + value, 3)
        start = bind(load(at, r, 1))

        def step(w: Any, r: Any = r, position: Any = position, left: Any = left) -> None:
            word = bind(load(mask, r * ldmask + w, 1))
            base = bind(load(position, 0, 1))
            count = bind(popcount(word))
            to = bind(r * ldout + base)
            if wide:
                places = compress_places(places_of_all, word, splat(0, "int8", 64))
                first = bind(T.broadcast(T.cast(w * WORD, "uint16"), 32))

                def write(half: int, places: Any = places, first: Any = first, to: Any = to) -> None:
                    lanes = [tirx.const(32 * half + j, "int32") for j in range(32)]
                    index = T.cast(T.reinterpret("uint8x32", tirx.Shuffle([places], lanes)), "uint16x32")
                    store(out, to + 32 * half, (index + first) << splat(6, "uint16", 32), 32)

                write(0)
                with when(count > T.int64(32)):
                    write(1)
            else:
                store(left, 0, word, 1)
                with for_range(0, count) as i:
                    rest = bind(load(left, 0, 1))
                    store(out, to + i, T.cast((w * WORD + first_bit(rest)) * PLACE, "uint16"), 1)
                    store(left, 0, rest & (rest - T.int64(1)), 1)
            store(position, 0, base + count, 1)

        with for_range(0, words // 4) as block:
            for i in range(4):
                step(bind(block * 4 + i))
        with for_range(words // 4 * 4, words) as w:
            step(w)
        finish_list(dtype, values, start, load(position, 0, 1), out, copy, r * ldout, counts, r)
        store(at, r, start + load(position, 0, 1), 1)


def _unconditional(dtype: str) -> int:
    """Values of a row that are copied whether they are there or not: no more than may be read behind the last one."""
    return {"int8": 64, "int32": 16}.get(dtype, 32)


def finish_list(
    dtype: str, values: Any, start: Any, count: Any, out: Any, copy: Any, to: Any, counts: Any, r: Any
) -> None:
    """Copies the row's ``count`` values as float32 or int8, pads both lists, and stores the padded count."""
    end, start = bind(count), bind(start)
    lanes = 64 if dtype == "int8" else 16
    for line in range(3):  # the row's next chunk: rows of a chunk lie too far apart for the hardware
        prefetch(values, start + end + lanes * line, 3)

    def take(i: Any) -> None:
        found = load(values, start + i * lanes, lanes)
        if dtype == "uint16":
            found = widen_bfloat16(found)
        store(copy, to + i * lanes, found, lanes)

    # Of a loop LLVM makes a call of memcpy, which takes longer than most lists.
    most = _unconditional(dtype) // lanes
    for i in range(most):
        take(i)
    with when(end > T.int64(most * lanes)), for_range(most, (end + T.int64(lanes - 1)) // lanes) as i:
        take(i)
    kept = {"uint16": "float32"}.get(dtype, dtype)
    store(copy, to + end, splat(0, kept, STEP), STEP)
    store(out, to + end, splat(0, "uint16", STEP), STEP)
    store(counts, r, (end + T.int64(STEP - 1)) // STEP * STEP, 1)


def widen_bfloat16(bits: Any) -> Any:
    """A vector of bfloat16, as uint16, to float32."""
    n = lanes_of(bits)
    return bind(T.reinterpret(f"float32x{n}", T.cast(bits, f"uint32x{n}") << splat(16, "uint32", n)))


def multiply_add(isa: Isa, kind: str, total: Any, x: Any, weight: Any) -> Any:
    """``total + x * weight`` lane by lane: floats, or (kind int32) sums of products of four unsigned and signed
    bytes."""
    if kind != "int32":
        return T.fma(x, weight, total)
    if isa.vnni:
        return vpdpbusd(total, x, T.reinterpret("int8x64", weight))
    even, odd = split_activation(x)
    low, high = split_weight(T.reinterpret("int8x32", weight))
    return total + vpmaddwd(even, low) + vpmaddwd(odd, high)


def _gemm(vectors: int, kind: str, isa: Isa, *arguments: Any) -> None:
    """``acc[r, 16 V] += copy[r, :] xt`` over the listed non-zeros of ``rows`` rows of weights; kind: float32, or int32
    for blocks of four codes (:func:`multiply_add`)."""
    xt, places, copy, ldlist, counts, rows, acc = arguments
    lanes = 16 if isa.registers == 32 or kind == "float32" else 8
    width = 16 * vectors
    count, sets = width // lanes, 2 if vectors == 4 and isa.registers == 32 else max(4 // vectors, 1)
    with for_range(0, rows) as r:
        sums = registers(count * sets, kind, lanes)
        for v in range(count):
            store(sums, v * lanes, load(acc, r * width + v * lanes, lanes), lanes)
            for s in range(1, sets):
                store(sums, (s * count + v) * lanes, splat(0, kind, lanes), lanes)
        with for_range(0, load(counts, r, 1) // 4) as g:
            four = bind(T.reinterpret("int64", load(places, r * ldlist + g * 4, 4)))
            for j in range(4):
                weight = bind(T.broadcast(load(copy, r * ldlist + g * 4 + j, 1), lanes))
                place = bind((four >> T.int64(16 * j)) & T.int64(0xFFFF))
                k = bind(place * (width // PLACE) if width >= PLACE else place // (PLACE // width))
                for v in range(count):
                    i = (j % sets * count + v) * lanes
                    x = load(xt, k + v * lanes, lanes)
                    store(sums, i, multiply_add(isa, kind, load(sums, i, lanes), x, weight), lanes)
        for v in range(count):
            total = load(sums, v * lanes, lanes)
            for s in range(1, sets):
                total = total + load(sums, (s * count + v) * lanes, lanes)
            store(acc, r * width + v * lanes, total, lanes)


def _order(isa: Isa, *arguments: Any) -> None:
    """``order``: ``rows`` rows (at most 64) by their ``counts`` of STEPs, below 255: the end of a row's loop in
    :func:`_gemm8` is then predicted. A wrong guess costs 16 cycles, as much as two steps, and a row has 13."""
    counts, rows, order = arguments
    if not isa.vnni:
        return  # never called: the driver takes rows as they come
    steps, position = registers(1, "uint8", 64), counter()
    with for_range(0, rows) as r:
        store(steps, r, T.cast(load(counts, r, 1) // STEP, "uint8"), 1)
    with for_range(rows, 64) as r:
        store(steps, r, load(steps, 0, 1), 1)
    least, most = (bind(T.cast(reduce_lanes(load(steps, 0, 64), pick), "int64")) for pick in (T.min, T.max))
    with for_range(rows, 64) as r:  # those that are not there come last
        store(steps, r, tirx.const(255, "uint8"), 1)
    every, places = bind(load(steps, 0, 64)), bind(iota64())
    store(position, 0, T.int64(0), 1)
    with for_range(least, most + T.int64(1)) as length:
        same = every ^ T.broadcast(T.cast(length, "uint8"), 64)
        bits = bind(_zeros_of(bind(T.reinterpret("int8x64", same))))
        found = compress_places(places, bits, splat(0, "int8", 64))
        store(order, load(position, 0, 1), T.reinterpret("uint8x64", found), 64)
        store(position, 0, load(position, 0, 1) + popcount(bits), 1)


def _zeros_of(vector: Any) -> Any:
    """Where an int8x64 is 0, as bits of an int64."""
    halves = []
    for half in range(2):
        lanes = [tirx.const(32 * half + j, "int32") for j in range(32)]
        part = bind(tirx.Shuffle([vector], lanes))
        signs = bind(T.Select(part == splat(0, "int8", 32), splat(-1, "int8", 32), splat(0, "int8", 32)))
        bits = T.call_llvm_pure_intrin("int32", "llvm.x86.avx2.pmovmskb", signs)
        halves.append(T.cast(T.cast(bits, "uint32"), "int64"))
    return halves[0] | (halves[1] << T.int64(32))


def _dot8(isa: Isa, *arguments: Any) -> None:
    """``t[m, r] += copy[r, :] x[m, :]`` over the listed non-zeros, one by one: for few rows of activations where an
    encoding has no kernel of its own."""
    x, ldx, m, places, copy, ldlist, counts, rows, t, ldt = arguments
    with for_range(0, m) as i, for_range(0, rows) as r:
        total = registers(1, "int32", 1)
        store(total, 0, T.int32(0), 1)
        with for_range(0, load(counts, r, 1)) as j:
            k = T.cast(load(places, r * ldlist + j, 1), "int64") // PLACE
            product = T.cast(load(x, i * ldx + k, 1), "int32") * T.cast(
                load(copy, r * ldlist + j, 1), "int32"
            )
            store(total, 0, load(total, 0, 1) + product, 1)
        store(t, i * ldt + r, load(t, i * ldt + r, 1) + load(total, 0, 1), 1)


def place8(isa: Isa, vector: int, lane: int) -> int:
    """Which row of activations a lane of the 8-bit sums belongs to: interleaving works inside 128 bits."""
    if isa.vnni:
        return 64 * (vector // 4) + 16 * (lane // 4) + 4 * (vector % 4) + lane % 4
    return 16 * vector + (lane % 4) + 8 * (lane // 4 % 2) + 4 * (lane // 8)


def _interleave(rows: list[Any]) -> list[Any]:
    """Four rows of 64 bytes to four vectors of 16 times 4 bytes, in the order of :func:`place8`."""

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


def _gemm8(vectors: int, isa: Isa, *arguments: Any) -> None:
    """``acc[r, 16 V] += copy[r, :] xt`` over the listed non-zeros of the rows ``r = order[0 .. rows - 1]`` of weights,
    four at a time."""
    xt, places, copy, ldlist, counts, order, rows, acc = arguments
    width, lanes = 16 * vectors, 16 if isa.vnni else 8
    count, sets = width // lanes, 2 if vectors == 4 and isa.vnni else 1
    with for_range(0, rows) as index:
        r, after = (bind(T.cast(load(order, index + i, 1), "int64")) for i in range(2))
        for v in range(vectors):  # of the next row, which the order hides from the hardware
            prefetch(acc, after * width + v * 16, 3)
        sums = registers(count * sets, "int32", lanes)
        for v in range(count):
            store(sums, v * lanes, load(acc, r * width + v * lanes, lanes), lanes)
            for s in range(1, sets):
                store(sums, (s * count + v) * lanes, splat(0, "int32", lanes), lanes)

        def four(g: Any, which: int, r: Any = r, sums: Any = sums) -> None:
            """Non-zeros 4 g .. 4 g + 3, added to one of the sets of sums."""
            weights = bind(T.reinterpret("int32", load(copy, r * ldlist + g * 4, 4)))
            # One load and shifts: four loads become a vector, and taking that apart costs more than the dots.
            quad = bind(T.reinterpret("int64", load(places, r * ldlist + g * 4, 4)))
            offsets = [bind((quad >> T.int64(16 * j) & T.int64(0xFFFF)) * (width // 64)) for j in range(4)]
            if isa.vnni:
                broadcast = bind(T.reinterpret("int8x64", T.broadcast(weights, 16)))
                for block in range(vectors // 4):
                    loaded = [bind(load(xt, o + 64 * block, 64)) for o in offsets]
                    for v, operand in enumerate(_interleave(loaded)):
                        i = (which * count + 4 * block + v) * 16
                        old = load(sums, i)
                        store(sums, i, vpdpbusd(old, T.reinterpret("int32x16", operand), broadcast))
                return
            for pair in range(2):
                low = (weights << T.int32(24 - 16 * pair)) >> T.int32(24)
                high = (weights << T.int32(16 - 16 * pair)) >> T.int32(24)
                both = (low & T.int32(0xFFFF)) | (high << T.int32(16))
                factor = bind(T.reinterpret("int16x16", T.broadcast(both, 8)))
                for block in range(vectors):
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

        steps = bind(load(counts, r, 1) // 4)
        with for_range(0, steps // sets) as g:
            for s in range(sets):
                four(g * sets + s, s)
        if sets == 2:
            with when(steps % 2 > T.int64(0)):
                four(steps - T.int64(1), 0)
        for v in range(count):
            total = load(sums, v * lanes, lanes)
            for s in range(1, sets):
                total = total + load(sums, (s * count + v) * lanes, lanes)
            store(acc, r * width + v * lanes, total, lanes)


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
                m = v * 16 + lane if dtype == "float32" else place8(isa, v, lane)
                store(t, m * 32 + half * 16, column)


def _kernels() -> list[Kernel]:
    kernels = []
    group = "sparse_many"
    lists = "mask: const i64*, ldmask: i64, words: i64, rows: i64, values: const {}*, at: i64*, out: u16*, copy: {}*"
    lists += ", ldout: i64, counts: i64*"
    for name, kind, copy, dtype in (
        ("sparse", "f32", "f32", "float32"),
        ("sparse16", "u16", "f32", "uint16"),
        ("sparse4x8", "i32", "i32", "int32"),
        ("sparse8", "i8", "i8", "int8"),
    ):
        signature = lists.format(kind, copy)
        emit = partial(_list, dtype, True)
        kernels.append(Kernel(f"{name}_list", signature, emit, "sparse_vbmi2", attributes=VBMI2))
        kernels.append(Kernel(f"{name}_list_plain", signature, partial(_list, dtype, False), group))
    gemm = "xt: const {}*, places: const u16*, copy: const {}*, ldlist: i64, counts: const i64*, rows: i64, acc: {}*"
    for vectors in GEMM_VECTORS:
        for name, kind, c in (("sparse", "float32", "f32"), ("sparse4x8", "int32", "i32")):
            emit = partial(_gemm, vectors, kind)
            kernels.append(Kernel(f"{name}_gemm_{vectors}", gemm.format(c, c, c), emit, group))
        emit = partial(_turn, vectors, "float32")
        kernels.append(Kernel(f"sparse_turn_{vectors}", "acc: const f32*, t: f32*", emit, group))
    for vectors in GEMM8_VECTORS:
        emit = partial(_gemm8, vectors)
        signature = gemm.format("u8", "i8", "i32").replace("rows: i64", "order: const u8*, rows: i64")
        kernels.append(Kernel(f"sparse8_gemm_{vectors}", signature, emit, group))
        emit = partial(_turn, vectors, "int32")
        kernels.append(Kernel(f"sparse8_turn_{vectors}", "acc: const i32*, t: i32*", emit, group))
    signature = "counts: const i64*, rows: i64, order: u8*"
    kernels.append(Kernel("sparse_order", signature, _order, "sparse_vbmi2", attributes=VBMI2))
    signature = (
        "x: const u8*, ldx: i64, m: i64, places: const u16*, copy: const i8*, ldlist: i64, counts: const i64*"
    )
    kernels.append(Kernel("sparse8_dot", f"{signature}, rows: i64, t: i32*, ldt: i64", _dot8, group))
    for prefix, kind, dtype in (("sparse", "f32", "float32"), ("sparse8", "u8", "uint8")):
        signature = f"x: const {kind}*, ldx: i64, rows: i64, width: i64, begin: i64, end: i64, xt: {kind}*"
        kernels.append(Kernel(f"{prefix}_transpose", signature, partial(_transpose, dtype), group))
    return kernels


KERNELS = _kernels()
