"""Linears on sparse int4 weights: a bitmask, two values to a byte, scales a row or for groups of inputs.

Identity: ``t[n] = sum_g scale[n, g] sum_(k in g) u_k w[n, k]``, or without scales (one a row), which are then the
epilogue's. One row of activations (``sparse4_gemv_*``, AVX512-VBMI2): the 32 bytes that hold a word's values become
64 bytes of 16 w (``vpmovzxdq``, ``vpmultishiftqb``, a mask), which are expanded as int8 is. The sums of a word are
those of its groups in different lanes, so that groups cost a conversion, a permutation of scales and a multiply-add a
word.

More rows, and processors without it (``sparse4_decode``): 16 rows are decoded to the panel layout of dense int4 as the
dense kernels unpack it, and their tiles do the rest: dense arithmetic on fewer bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .dot import vpdpbusd
from .linear import prefetch
from .math import reduce_lanes, shuffle, transpose16
from .sparse import expand8
from .sparse_many import VBMI2, popcount, splat

SHARED = 8
"""Rows of weights that share a word's activations; two times as many are a panel."""

WORD = 64


def zeros(zero: Any) -> Any:
    """int8x64 of zeros that the compiler does not know to be zeros (sparse.py)."""
    return bind(T.reinterpret("int8x64", T.broadcast(zero, 16)))


def _codes(values: Any, at: Any) -> Any:
    """The next 64 values, times 16, as int8x64."""
    words = T.cast(T.reinterpret("uint32x8", load(values, at, 32)), "uint64x8")
    shifts = sum(((4 * i - 4) % 64) << (8 * i) for i in range(8))
    control = T.reinterpret("int8x64", T.broadcast(tirx.const(shifts, "int64"), 8))
    name = "llvm.x86.avx512.pmultishift.qb.512"
    moved = T.call_llvm_pure_intrin("int8x64", name, control, T.reinterpret("int8x64", words))
    return moved & splat(-16, "int8", 64)


def pdep(source: Any, where: Any) -> Any:
    """The lowest bits of an int64 at the places of the set bits of another."""
    return T.call_llvm_pure_intrin("int64", "llvm.x86.bmi.pdep.64", source, where)


def _gemv(mode: str, isa: Isa, *arguments: Any) -> None:
    """``t[n - begin]`` of rows ``begin..end`` and one row of activations; mode: ``pc``: int32 sums; ``g32``, ``g64``:
    float sums with scales of groups of 32, or of a multiple of 64 inputs. ``end - begin`` is a multiple of 16."""
    x, mask, words, values, offsets, begin, end, scale, groups, group, t, zero, again = arguments
    if not isa.vnni:
        return  # never called: the driver decodes
    nothing = zeros(zero)
    dtype = "int32" if mode == "pc" else "float32"
    sums = registers(SHARED, dtype)
    at = registers(SHARED, "int64", 1)
    with for_range(0, (end - begin) // 16) as panel:
        for part in range(16 // SHARED):
            first = bind(begin + panel * 16 + part * SHARED)
            for i in range(SHARED):
                store(sums, i * 16, splat(0, dtype, 16))
                store(at, i, T.cast(load(offsets, first + i, 1), "int64"), 1)
            next_ = bind(T.cast(load(offsets, first + SHARED, 1), "int64"))
            pace = bind((next_ - load(at, 0, 1)) // words)
            behind = bind(next_ * 2 - load(at, 0, 1))  # about where the rows after the next ones begin
            row = bind(first // 16 * groups * 16)
            with for_range(0, words) as w:
                prefetch(mask, (first + 2 * SHARED) * words + w * SHARED, 3)
                for line in range(3):
                    prefetch(values, behind + w * pace + 64 * line, 3)
                codes = bind(T.reinterpret("int32x16", load(x, w * WORD, 64)))
                factors = []
                if mode == "g32":
                    second = T.min(
                        w * 2 + 1, groups - T.int64(1)
                    )  # a group that is not there meets no weights
                    factors = [w * 2, second]
                elif mode == "g64":
                    factors = [w * WORD // group]
                if factors and part == 0:
                    prefetch(scale, row + (groups + factors[0]) * 16, 3)  # of the next panel
                scales = [bind(T.cast(load(scale, row + g * 16), "float32x16")) for g in factors]
                for i in range(SHARED):
                    word = bind(load(mask, (first + i) * words + w, 1))
                    offset = bind(load(at, i, 1))
                    bits = T.reinterpret("uint1x64", load(again, (first + i) * words + w, 1))
                    weights = expand8(_codes(values, offset), bits, nothing)
                    store(at, i, offset + ((popcount(word) + T.int64(1)) >> T.int64(1)), 1)
                    if mode == "pc":
                        store(sums, i * 16, vpdpbusd(load(sums, i * 16), codes, weights))
                        continue
                    products = T.cast(vpdpbusd(splat(0, "int32", 16), codes, weights), "float32x16")
                    lane = part * SHARED + i
                    lanes = [lane + 16 * (j // 8) * (len(scales) - 1) for j in range(16)]
                    factor = shuffle(scales[0], scales[-1], lanes)
                    store(sums, i * 16, T.fma(products, factor, load(sums, i * 16)))
            for i in range(SHARED):
                total = reduce_lanes(load(sums, i * 16), lambda a, b: a + b)
                store(t, panel * 16 + part * SHARED + i, total, 1)


def _decode(isa: Isa, *arguments: Any) -> None:
    """``out[c, r, j]``: the codes of inputs 4 c + j of ``words`` words of 16 rows, times 16 on v4 (dot.py);
    ``at[r]``, the row's byte in values, moves on."""
    mask, ldmask, words, values, at, out, zero = arguments
    if not isa.vnni:
        _decode_plain(isa, mask, ldmask, words, values, at, out)
        return
    nothing = zeros(zero)
    with for_range(0, words) as w:
        rows = []
        for r in range(16):
            word = bind(load(mask, r * ldmask + w, 1))
            offset = bind(load(at, r, 1))
            weights = expand8(_codes(values, offset), T.reinterpret("uint1x64", word), nothing)
            rows.append(bind(T.reinterpret("int32x16", weights)))
            store(at, r, offset + ((popcount(word) + T.int64(1)) >> T.int64(1)), 1)
        for c, vector in enumerate(transpose16(rows)):
            store(out, (w * 16 + c) * 64, T.reinterpret("int8x64", vector), 64)


def _decode_plain(isa: Isa, *arguments: Any) -> None:
    """The same by ``pdep``, 8 inputs at a time: nibbles to bytes, bytes to where their bits are set."""
    mask, ldmask, words, values, at, out = arguments
    with for_range(0, 16) as r, for_range(0, words) as w:
        word = bind(load(mask, r * ldmask + w, 1))
        nibbles = registers(1, "int64", 1)
        store(nibbles, 0, load(at, r, 1) * 2, 1)
        for part in range(8):
            bits = bind((word >> T.int64(8 * part)) & T.int64(255))
            start = bind(load(nibbles, 0, 1))
            packed = bind(T.reinterpret("int64", load(values, start >> T.int64(1), 8)))
            packed = packed >> ((start & T.int64(1)) * 4)
            code = bind(pdep(packed, T.int64(0x0F0F0F0F0F0F0F0F)))
            # Times 16 the sign is where it belongs; else it is copied upwards: 8 * 30 = 240.
            code = code << T.int64(4) if isa.vnni else code | ((code & T.int64(0x0808080808080808)) * 30)
            where = pdep(bits, T.int64(0x0101010101010101)) * 255
            spread = bind(pdep(code, where))
            words_of = T.reinterpret("int8x8", spread)
            for half in range(2):
                to = ((w * 16 + 2 * part + half) * 16 + r) * 4
                lanes = [tirx.const(4 * half + j, "int32") for j in range(4)]
                store(out, to, tirx.Shuffle([words_of], lanes), 4)
            store(nibbles, 0, start + popcount(bits), 1)
        store(at, r, (load(nibbles, 0, 1) + T.int64(1)) >> T.int64(1), 1)


def _decode_slowly(isa: Isa, *arguments: Any) -> None:
    _decode_plain(isa, *arguments[:-1])


def _kernels() -> list[Kernel]:
    kernels = []
    for mode in ("pc", "g32", "g64"):
        signature = (
            "x: const u8*, mask: const i64*, words: i64, values: const u8*, offsets: const i32*, begin: i64"
        )
        signature += (
            f", end: i64, scale: const f16*, groups: i64, group: i64, t: {'i32' if mode == 'pc' else 'f32'}*"
        )
        signature += ", zero: i32, again: const i64*"
        emit = partial(_gemv, mode)
        kernels.append(Kernel(f"sparse4_gemv_{mode}", signature, emit, "sparse_vbmi2", attributes=VBMI2))
    signature = "mask: const i64*, ldmask: i64, words: i64, values: const u8*, at: i64*, out: i8*, zero: i32"
    kernels.append(Kernel("sparse4_decode", signature, _decode, "sparse_vbmi2", attributes=VBMI2))
    kernels.append(Kernel("sparse4_decode_plain", signature, _decode_slowly, "sparse_many"))
    return kernels


KERNELS = _kernels()
