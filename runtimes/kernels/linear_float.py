"""Packed linears with float activations: ``y = x W^T``, W dequantized on the fly.

Identity: ``t[m, n] = sum_k x[m, k] scale[n, g(k)] (w[n, k] - zero[n, g(k)])``; the power-of-two multiplier,
bias, activation and residual are the work of ``epilogue_g_*`` of linear.py (with s = 1, z = 0), which also
owns the ragged edge in N.

* Few rows (``float_gemv{bits}_{mode}_R``): a panel's 64-byte vector holds 4 (int4: 8, int2: 16) inputs of 16
  features. On v4, codes of 4 bits and fewer are shifted to the bottom of their 32-bit lane, where a permutation looks
  their values up (it reads 4 bits of a lane): shift, permutation, multiply-add with the broadcast activation. Others
  are moved to the top of the lane and back (the second shift extends the sign) and converted, an operation more and
  1.7 times as long. The sum over a block of 32 inputs is scaled once; with one row, zero points are multiplied by the
  sum of its activations instead of subtracted from each weight. Registers: 4 chains of sums, R scaled sums, a few
  temporaries.
* Many rows: ``float_unpack{bits}_{mode}`` dequantizes a chunk of two panels to ``[inputs, 32]`` float32 in
  the first-level cache, ``float_tile_R`` multiplies it by R rows: 2 R accumulators (16 for R = 8), 2 loads
  and R broadcasts for 2 R multiply-adds.

The unit is a block of 32 inputs, which always lies in one group; x is not padded, so the driver hands the
last, partial block over as a zero-filled copy. Everything is 16 lanes wide with no intrinsics: LLVM halves it
for v3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .linear import ROWS, prefetch_stream
from .math import reduce_lanes

GEMV_ROWS = (4, 2, 1)
"""Rows of the kernels that dequantize in registers."""

BLOCK = 32
"""Inputs that share one scale in every group size."""


def _splat(value: float, dtype: str = "float32") -> Any:
    return T.broadcast(tirx.const(value, dtype), 16)


def _values(isa: Isa, bits: int, fetch: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """(input, its 16 codes as float32) of a block; ``fetch(i)`` is vector i of its ``bits`` vectors, as int32x16."""
    if bits == 3:
        words = []
        for plane in range(3):
            words.append(fetch(plane))
            for half, at in enumerate((5, 2)):
                yield from (
                    (8 * plane + 4 * half + j, _value(isa, 3, words[plane], 8 * j + at)) for j in range(4)
                )
        low, sign = _splat(0x03030303, "int32"), _splat(0x04040404, "int32")
        for i in range(2):
            joined = bind((words[i] & low) | ((words[2] << _splat(2 - i, "int32")) & sign))
            yield from ((24 + 4 * i + j, _value(isa, 3, joined, 8 * j)) for j in range(4))
        return
    per_word = 32 // bits
    for i in range(bits):
        word = fetch(i)
        for k in range(per_word):
            yield i * per_word + k, _value(isa, bits, word, 8 * (k % 4) + bits * (k // 4))


def _value(isa: Isa, bits: int, word: Any, at: int) -> Any:
    """The codes whose lowest bit is bit ``at`` of each word, as float32x16."""
    if bits < 8 and isa.vnni:
        index = word >> _splat(at, "int32") if at else word
        return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", _table(bits), index)
    left = 32 - bits - at
    top = word << _splat(left, "int32") if left else word
    return T.cast(top >> _splat(32 - bits, "int32"), "float32x16")


def _table(bits: int) -> Any:
    """What each 4-bit index stands for when only its ``bits`` low bits count."""
    away = _splat(32 - bits, "int32")
    return T.cast((T.ramp(T.int32(0), T.int32(1), 16) << away) >> away, "float32x16")


def _group_vector(buffer: Any, block: Any, blocks_per_group: Any) -> Any:
    return T.cast(load(buffer, block // blocks_per_group * 16), "float32x16")


def _zero_vector(bits: int, zero: Any, block: Any, blocks_per_group: Any) -> Any:
    """Zero points of a block's group in codes; those of 2 and 3 bits are stored in sixteenths."""
    stored = _group_vector(zero, block, blocks_per_group)
    return bind(stored * _splat(1 / 16) if bits < 4 else stored)


def _gemv(bits: int, mode: str, rows: int, isa: Isa, *arguments: Any) -> None:
    """t[r, 0:16] += the panel's dot products with row r over blocks begin..end; x points at input ``32 * begin``."""
    x, ldx, w, scale, *rest = arguments
    zero = rest.pop(0) if mode.endswith("z") else None
    begin, end, group, t, ldt = rest
    grouped = mode.startswith("g")
    per_group = bind(group // BLOCK)
    ways = 4 // rows  # chains of multiply-adds in flight, each waits 4 cycles for itself
    total = registers(rows, "float32")
    part = registers(rows * ways, "float32")

    def clear() -> None:
        for i in range(rows * ways):
            store(part, i * 16, _splat(0.0))

    def merged(r: int) -> Any:
        parts = [load(part, (r * ways + i) * 16) for i in range(ways)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    for r in range(rows):
        store(total, r * 16, load(t, ldt * r))
    if not grouped:
        clear()
    with for_range(begin, end) as block:
        zeros = None if zero is None else _zero_vector(bits, zero, block, per_group)
        at_once = zeros is not None and grouped and rows == 1
        if grouped:
            clear()

        def fetch(v: int, block: Any = block) -> Any:
            at = (block * bits + v) * 64
            prefetch_stream(w, at)
            return bind(T.reinterpret("int32x16", load(w, at, 64)))

        for k, value in _values(isa, bits, fetch):
            weight = bind(value if zeros is None or at_once else value - zeros)
            for r in range(rows):
                activation = T.broadcast(load(x, ldx * r + (block - begin) * BLOCK + k, 1), 16)
                i = (r * ways + k % ways) * 16
                store(part, i, T.fma(activation, weight, load(part, i)))
        if grouped:
            scales = bind(_group_vector(scale, block, per_group))
            if at_once:
                inside = (block - begin) * BLOCK
                halves = bind(load(x, inside) + load(x, inside + 16))
                activations = T.broadcast(reduce_lanes(halves, lambda a, b: a + b), 16)
                store(part, 0, load(part, 0) - activations * zeros)
            for r in range(rows):
                store(total, r * 16, T.fma(merged(r), scales, load(total, r * 16)))
    for r in range(rows):
        value = load(total, r * 16)
        store(t, ldt * r, value if grouped else T.fma(merged(r), load(scale, 0), value))


def _unpack(bits: int, mode: str, isa: Isa, *arguments: Any) -> None:
    """out[k, 0:16] = dequantized weights of one panel over blocks begin..end; rows of out are 32 floats apart."""
    w, scale, *rest = arguments
    zero = rest.pop(0) if mode.endswith("z") else None
    begin, end, group, out = rest
    per_group = bind(group // BLOCK)
    with for_range(begin, end) as block:
        scales = bind(_group_vector(scale, block, per_group) if mode.startswith("g") else load(scale, 0))
        zeros = None if zero is None else _zero_vector(bits, zero, block, per_group)

        def fetch(v: int, block: Any = block) -> Any:
            return bind(T.reinterpret("int32x16", load(w, (block * bits + v) * 64, 64)))

        for k, value in _values(isa, bits, fetch):
            centred = value if zeros is None else value - zeros
            store(out, ((block - begin) * BLOCK + k) * 32, centred * scales)


def _tile(rows: int, isa: Isa, x: Any, ldx: Any, w: Any, inputs: Any, t: Any, ldt: Any) -> None:
    """t[r, 0:32] += x[r, :] @ w for ``rows`` rows; w is ``[inputs, 32]``, inputs a multiple of 32."""
    wide = 2 if isa.registers == 32 or rows == 1 else 1
    high = rows if isa.registers == 32 else min(rows, 4)
    for half in range(0, 2, wide):
        for row0 in range(0, rows, high):
            acc = registers(high * wide, "float32")
            for i in range(high * wide):
                store(acc, i * 16, load(t, ldt * (row0 + i // wide) + (half + i % wide) * 16))
            with for_range(0, inputs // 4) as step:
                for j in range(4):
                    k = step * 4 + j
                    weights = [bind(load(w, k * 32 + (half + v) * 16)) for v in range(wide)]
                    for r in range(high):
                        value = bind(T.broadcast(load(x, ldx * (row0 + r) + k, 1), 16))
                        for v in range(wide):
                            i = (r * wide + v) * 16
                            store(acc, i, T.fma(value, weights[v], load(acc, i)))
            for i in range(high * wide):
                store(t, ldt * (row0 + i // wide) + (half + i % wide) * 16, load(acc, i * 16))


MODES = ("pc", "pcz", "g", "gz")
"""Per channel (float32 scale) or groups (float16), without or with zero points."""


def _kernels() -> list[Kernel]:
    kernels = []
    for mode in MODES:
        arrays = "scale: const f16*" if mode.startswith("g") else "scale: const f32*"
        arrays += ", zero: const i8*" if mode.endswith("z") else ""
        blocks = "begin: i64, end: i64, group: i64"
        for bits in (8, 4) if mode.startswith("pc") else (8, 4, 3, 2):
            for rows in GEMV_ROWS:
                signature = f"x: const f32*, ldx: i64, w: const u8*, {arrays}, {blocks}, t: f32*, ldt: i64"
                emit = partial(_gemv, bits, mode, rows)
                kernels.append(
                    Kernel(f"float_gemv{bits}_{mode}_{rows}", signature, emit, f"linear_float{bits}")
                )
            signature = f"w: const u8*, {arrays}, {blocks}, out: f32*"
            emit = partial(_unpack, bits, mode)
            kernels.append(Kernel(f"float_unpack{bits}_{mode}", signature, emit, f"linear_float{bits}"))
    for rows in ROWS:
        signature = "x: const f32*, ldx: i64, w: const f32*, inputs: i64, t: f32*, ldt: i64"
        kernels.append(Kernel(f"float_tile_{rows}", signature, partial(_tile, rows), "linear_float8"))
    return kernels


KERNELS = _kernels()
