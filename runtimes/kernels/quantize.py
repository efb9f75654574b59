"""Activation quantizers: float32 rows to unsigned 8-bit with a zero point, bit for bit the formula of
docs/dialect.md.

Per row (dynamic)::

    lo = min(min x, 0); hi = max(max x, 0); s = (hi - lo) / 255 (1 where hi == lo); z = rint(-lo / s)
    u  = clamp(rint(x * (1 / s)) + z, 0, 255)

``quantize_rows`` makes two passes over a row (the second finds it in the cache); ``quantize_rows_static``
one, with a given pair. ``row_range`` and ``range_to_params`` are the halves of the first pass, for a row that
several threads share (one sample of a convolution). Rounding is half to even (the machine's default mode,
which ``nearbyint`` uses); the clamp is done on floats, where rint(x / s) + z is exact. Columns k..kp-1 are
written as 0.
"""

from __future__ import annotations

from typing import Any

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store

UNROLL = 4
"""Vectors in flight: minimum and maximum have a latency of 4 or so."""


def _splat(value: Any, lanes: int = 16) -> Any:
    return T.broadcast(T.float32(value) if isinstance(value, (int, float)) else value, lanes)


def _range(x: Any, base: Any, k: Any) -> tuple[Any, Any]:
    """Minimum and maximum of 0 and x[base : base + k]."""
    low, high = registers(UNROLL, "float32"), registers(UNROLL, "float32")
    for i in range(UNROLL):
        store(low, 16 * i, _splat(0.0))
        store(high, 16 * i, _splat(0.0))
    chunk = 16 * UNROLL
    with for_range(0, k // chunk) as c:
        for i in range(UNROLL):
            value = bind(load(x, base + c * chunk + 16 * i))
            store(low, 16 * i, T.min(load(low, 16 * i), value))
            store(high, 16 * i, T.max(load(high, 16 * i), value))
    done = bind(k // chunk * chunk)
    with for_range(0, (k - done) // 16) as c:
        value = bind(load(x, base + done + c * 16))
        store(low, 0, T.min(load(low, 0), value))
        store(high, 0, T.max(load(high, 0), value))
    for i in range(1, UNROLL):
        store(low, 0, T.min(load(low, 0), load(low, 16 * i)))
        store(high, 0, T.max(load(high, 0), load(high, 16 * i)))
    # A scratch of its own for the narrow accesses: they would keep the accumulators of the loop out of registers.
    fold = registers(2, "float32")
    store(fold, 0, load(low, 0))
    store(fold, 16, load(high, 0))
    for width in (8, 4, 2, 1):
        store(fold, 0, T.min(load(fold, 0, width), load(fold, width, width)), width)
        store(fold, 16, T.max(load(fold, 16, width), load(fold, 16 + width, width)), width)
    vectors = bind(k // 16 * 16)
    with for_range(0, k - vectors) as j:
        value = bind(load(x, base + vectors + j, 1))
        store(fold, 0, T.min(load(fold, 0, 1), value), 1)
        store(fold, 16, T.max(load(fold, 16, 1), value), 1)
    return bind(load(fold, 0, 1)), bind(load(fold, 16, 1))


def _pair(lo: Any, hi: Any) -> tuple[Any, Any]:
    """Scale and zero point of a range."""
    s = bind(T.Select(hi == lo, T.float32(1.0), (hi - lo) / T.float32(255.0)))
    z = T.nearbyint((T.float32(0.0) - lo) / s)
    return s, bind(T.min(T.max(z, T.float32(0.0)), T.float32(255.0)))


def _code(value: Any, inverse: Any, z: Any, lanes: int) -> Any:
    rounded = T.nearbyint(value * (_splat(inverse, lanes) if lanes > 1 else inverse))
    shifted = rounded + (_splat(z, lanes) if lanes > 1 else z)
    low, high = (
        (_splat(0.0, lanes), _splat(255.0, lanes)) if lanes > 1 else (T.float32(0.0), T.float32(255.0))
    )
    suffix = f"x{lanes}" if lanes > 1 else ""
    return T.cast(T.cast(T.min(T.max(shifted, low), high), f"int32{suffix}"), f"uint8{suffix}")


def _pack64(isa: Isa, x: Any, at: Any, inverse: Any, z: Any) -> Any:
    """Codes of x[at : at + 64] as uint8x64: converting (half to even), then narrowing with saturation as the clamp.

    Packs interleave by 128-bit lanes, which one permutation of 32-bit words undoes. Converting saturates nothing, so
    that products are cut off at 2**30 first; below -2**31 the result is the most negative integer, as it should be.
    """
    words = []
    for i in range(4):
        scaled = T.min(load(x, at + 16 * i) * _splat(inverse), _splat(2.0**30))
        words.append(T.call_llvm_pure_intrin("int32x16", "llvm.lrint.v16i32.v16f32", scaled))
    halves = []
    for a, b in (words[:2], words[2:]):
        packed = T.call_llvm_pure_intrin("int16x32", "llvm.x86.avx512.packssdw.512", a, b)
        halves.append(T.call_llvm_pure_intrin("int16x32", "llvm.sadd.sat.v32i16", packed, z))
    codes = T.call_llvm_pure_intrin("int8x64", "llvm.x86.avx512.packuswb.512", *halves)
    lane = T.ramp(T.int32(0), T.int32(1), 16)
    order = (lane & T.broadcast(T.int32(3), 16)) * T.broadcast(T.int32(4), 16) + (
        lane >> T.broadcast(T.int32(2), 16)
    )
    words512 = T.reinterpret("int32x16", codes)
    sorted_ = T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.permvar.si.512", words512, order)
    return T.reinterpret("uint8x64", sorted_)


def write_codes(isa: Isa, x: Any, base: Any, k: Any, u: Any, out: Any, kp: Any, s: Any, z: Any) -> None:
    """u[out : out + kp] = codes of x[base : base + k], zeros after."""
    inverse = bind(T.float32(1.0) / s)
    done: Any = T.int64(0)
    if isa.vnni:
        point = bind(T.broadcast(T.cast(z, "int16"), 32))
        with for_range(0, k // 64) as c:
            store(u, out + c * 64, _pack64(isa, x, base + c * 64, inverse, point), 64)
        done = bind(k // 64 * 4)
    with for_range(done, k // 16) as c:
        store(u, out + c * 16, _code(load(x, base + c * 16), inverse, z, 16))
    vectors = bind(k // 16 * 16)
    with for_range(vectors, k) as j:
        store(u, out + j, _code(load(x, base + j, 1), inverse, z, 1), 1)
    with for_range(k, kp) as j:
        store(u, out + j, T.uint8(0), 1)


def quantize_row(
    isa: Isa, x: Any, base: Any, k: Any, u: Any, out: Any, kp: Any, params: Any, at: Any
) -> None:
    """Dynamic quantization of one row, for kernels that produce rows: codes to u[out:], the pair to params[at:]."""
    s, z = _pair(*_range(x, base, k))
    store(params, at, s, 1)
    store(params, at + 1, z, 1)
    write_codes(isa, x, base, k, u, out, kp, s, z)


def _quantize_rows(isa: Isa, x: Any, u: Any, params: Any, rows: Any, k: Any, kp: Any) -> None:
    with for_range(0, rows) as m:
        quantize_row(isa, x, m * k, k, u, m * kp, kp, params, m * 2)


def _quantize_rows_static(isa: Isa, x: Any, u: Any, params: Any, rows: Any, k: Any, kp: Any) -> None:
    s, z = bind(load(params, 0, 1)), bind(load(params, 1, 1))
    with for_range(0, rows) as m:
        write_codes(isa, x, m * k, k, u, m * kp, kp, s, z)


def _row_range(isa: Isa, x: Any, k: Any, pair: Any) -> None:
    low, high = _range(x, T.int64(0), k)
    store(pair, 0, low, 1)
    store(pair, 1, high, 1)


def _range_to_params(isa: Isa, pair: Any, params: Any) -> None:
    s, z = _pair(bind(load(pair, 0, 1)), bind(load(pair, 1, 1)))
    store(params, 0, s, 1)
    store(params, 1, z, 1)


_ROWS = "rows: i64, k: i64, kp: i64"
KERNELS = [
    Kernel("quantize_rows", f"x: const f32*, u: u8*, params: f32*, {_ROWS}", _quantize_rows, "quantize"),
    Kernel(
        "quantize_rows_static",
        f"x: const f32*, u: u8*, params: const f32*, {_ROWS}",
        _quantize_rows_static,
        "quantize",
    ),
    Kernel("row_range", "x: const f32*, k: i64, pair: f32*", _row_range, "quantize"),
    Kernel("range_to_params", "pair: const f32*, params: f32*", _range_to_params, "quantize"),
]
