"""Activation quantizers: float32 rows to unsigned codes 0..levels (255 or 15) with a zero point, bit for bit the
formula of docs/dialect.md.

Per row (dynamic)::

    x' = (x - shift) * scale              (vectors of k; a bit of ``flags`` says which are there)
    lo = min(min x', 0); hi = max(max x', 0); s = (hi - lo) / levels (1 where that is < 2^-126); z = rint(-lo / s)
    u  = clamp(rint(x' * (1 / s)) + z, 0, levels)

``quantize_rows`` makes two passes over a row (the second finds it in the cache, and computes x' again);
``quantize_rows_static`` one, with a given pair. ``row_range`` and ``range_to_params`` are the halves of the first
pass at 8 bits, for a row that several threads share (one sample of a convolution). Rounding is half to even (the
machine's default mode, which ``nearbyint`` uses); the clamp is done on floats, where rint(x' / s) + z is exact.
Columns k..kp-1 are written as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store

SHIFT, SCALE = 1, 2
"""Bits of `flags`: vectors that are there."""

Read = Callable[[Any, int], Any]
"""`read(j, lanes)`: elements j..j + lanes of the row that is quantized."""

LEAST_SCALE = 2.0**-126
"""As in compiler/dialect/quantization.py."""
UNROLL = 4
"""Vectors in flight: minimum and maximum have a latency of 4 or so."""


def _splat(value: Any, lanes: int = 16) -> Any:
    return T.broadcast(T.float32(value) if isinstance(value, (int, float)) else value, lanes)


def plain(x: Any, base: Any) -> Read:
    """The row x[base : base + k] itself."""
    return lambda j, lanes: load(x, base + j, lanes)


def _affine(read: Read, shift: Any, scale: Any) -> Read:
    """(row - shift) * scale; None: that vector is absent."""

    def transformed(j: Any, lanes: int) -> Any:
        value = read(j, lanes)
        value = value if shift is None else value - load(shift, j, lanes)
        return value if scale is None else value * load(scale, j, lanes)

    return transformed


def choose_affine(flags: Any, shift: Any, scale: Any, body: Callable[[Callable[[Read], Read]], None]) -> None:
    """Emit `body(wrap)` for each combination of the two vectors, behind a test of `flags`."""

    def is_set(bit: int) -> Any:
        return T.bitwise_and(flags, tirx.const(bit, "int64")) != 0

    def scaled(chosen: Any) -> None:
        with T.If(is_set(SCALE)):
            with T.Then():
                body(lambda read: _affine(read, chosen, scale))
            with T.Else():
                body(lambda read: _affine(read, chosen, None))

    with T.If(is_set(SHIFT)):
        with T.Then():
            scaled(shift)
        with T.Else():
            scaled(None)


def _range(read: Read, k: Any) -> tuple[Any, Any]:
    """Minimum and maximum of 0 and the row."""
    low, high = registers(UNROLL, "float32"), registers(UNROLL, "float32")
    for i in range(UNROLL):
        store(low, 16 * i, _splat(0.0))
        store(high, 16 * i, _splat(0.0))
    chunk = 16 * UNROLL
    with for_range(0, k // chunk) as c:
        for i in range(UNROLL):
            value = bind(read(c * chunk + 16 * i, 16))
            store(low, 16 * i, T.min(load(low, 16 * i), value))
            store(high, 16 * i, T.max(load(high, 16 * i), value))
    done = bind(k // chunk * chunk)
    with for_range(0, (k - done) // 16) as c:
        value = bind(read(done + c * 16, 16))
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
        value = bind(read(vectors + j, 1))
        store(fold, 0, T.min(load(fold, 0, 1), value), 1)
        store(fold, 16, T.max(load(fold, 16, 1), value), 1)
    return bind(load(fold, 0, 1)), bind(load(fold, 16, 1))


def pair_of(lo: Any, hi: Any, levels: Any) -> tuple[Any, Any]:
    """Scale and zero point of a range."""
    s = bind((hi - lo) / levels)
    s = bind(T.Select(s < T.float32(LEAST_SCALE), T.float32(1.0), s))
    z = T.nearbyint((T.float32(0.0) - lo) / s)
    return s, bind(T.min(T.max(z, T.float32(0.0)), levels))


def _code(value: Any, inverse: Any, z: Any, levels: Any, lanes: int) -> Any:
    rounded = T.nearbyint(value * (_splat(inverse, lanes) if lanes > 1 else inverse))
    shifted = rounded + (_splat(z, lanes) if lanes > 1 else z)
    low, high = (_splat(0.0, lanes), _splat(levels, lanes)) if lanes > 1 else (T.float32(0.0), levels)
    suffix = f"x{lanes}" if lanes > 1 else ""
    return T.cast(T.cast(T.min(T.max(shifted, low), high), f"int32{suffix}"), f"uint8{suffix}")


def _pack64(read: Read, at: Any, inverse: Any, z: Any, largest: Any) -> Any:
    """Codes of row[at : at + 64] as uint8x64: converting (half to even), then narrowing with saturation as the clamp.

    Packs interleave by 128-bit lanes, which one permutation of 32-bit words undoes. Converting saturates nothing, so
    that products are cut off at 2**30 first; below -2**31 the result is the most negative integer, as it should be.
    """
    words = []
    for i in range(4):
        scaled = T.min(read(at + 16 * i, 16) * _splat(inverse), _splat(2.0**30))
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
    return T.min(T.reinterpret("uint8x64", sorted_), largest)


def write_codes(isa: Isa, read: Read, k: Any, u: Any, out: Any, kp: Any, s: Any, z: Any, levels: Any) -> None:
    """u[out : out + kp] = codes of the row, zeros after."""
    inverse = bind(T.float32(1.0) / s)
    done: Any = T.int64(0)
    if isa.vnni:
        point = bind(T.broadcast(T.cast(z, "int16"), 32))
        largest = bind(T.broadcast(T.cast(levels, "uint8"), 64))
        with for_range(0, k // 64) as c:
            store(u, out + c * 64, _pack64(read, c * 64, inverse, point, largest), 64)
        done = bind(k // 64 * 4)
    with for_range(done, k // 16) as c:
        store(u, out + c * 16, _code(read(c * 16, 16), inverse, z, levels, 16))
    vectors = bind(k // 16 * 16)
    with for_range(vectors, k) as j:
        store(u, out + j, _code(read(j, 1), inverse, z, levels, 1), 1)
    with for_range(k, kp) as j:
        store(u, out + j, T.uint8(0), 1)


def quantize_row(
    isa: Isa, read: Read, k: Any, u: Any, out: Any, kp: Any, params: Any, at: Any, levels: Any
) -> None:
    """Dynamic quantization of one row, for kernels that produce rows: codes to u[out:], the pair to params[at:]."""
    s, z = pair_of(*_range(read, k), levels)
    store(params, at, s, 1)
    store(params, at + 1, z, 1)
    write_codes(isa, read, k, u, out, kp, s, z, levels)


def _quantize_rows(
    isa: Isa,
    x: Any, shift: Any, scale: Any, u: Any, params: Any,
    rows: Any, k: Any, kp: Any, flags: Any, levels: Any,
) -> None:  # fmt: skip
    def body(wrap: Callable[[Read], Read]) -> None:
        with for_range(0, rows) as m:
            quantize_row(isa, wrap(plain(x, m * k)), k, u, m * kp, kp, params, m * 2, levels)

    choose_affine(flags, shift, scale, body)


def _quantize_rows_static(
    isa: Isa,
    x: Any, shift: Any, scale: Any, u: Any, params: Any,
    rows: Any, k: Any, kp: Any, flags: Any, levels: Any,
) -> None:  # fmt: skip
    s, z = bind(load(params, 0, 1)), bind(load(params, 1, 1))

    def body(wrap: Callable[[Read], Read]) -> None:
        with for_range(0, rows) as m:
            write_codes(isa, wrap(plain(x, m * k)), k, u, m * kp, kp, s, z, levels)

    choose_affine(flags, shift, scale, body)


def _row_range(isa: Isa, x: Any, k: Any, pair: Any) -> None:
    low, high = _range(plain(x, T.int64(0)), k)
    store(pair, 0, low, 1)
    store(pair, 1, high, 1)


def _range_to_params(isa: Isa, pair: Any, params: Any) -> None:
    s, z = pair_of(bind(load(pair, 0, 1)), bind(load(pair, 1, 1)), T.float32(255.0))
    store(params, 0, s, 1)
    store(params, 1, z, 1)


def _signature(params: str) -> str:
    vectors = "x: const f32*, shift: const f32*, scale: const f32*"
    return f"{vectors}, u: u8*, params: {params}, rows: i64, k: i64, kp: i64, flags: i64, levels: f32"


KERNELS = [
    Kernel("quantize_rows", _signature("f32*"), _quantize_rows, "quantize"),
    Kernel("quantize_rows_static", _signature("const f32*"), _quantize_rows_static, "quantize"),
    Kernel("row_range", "x: const f32*, k: i64, pair: f32*", _row_range, "quantize"),
    Kernel("range_to_params", "pair: const f32*, params: f32*", _range_to_params, "quantize"),
]
