"""FP8 activations: float32 rows to E4M3 codes and back, bit for bit as compiler/dialect/quantization_fp8.py says.

Per row (dynamic)::

    x' = (x - shift) * scale        (vectors of k; a bit of ``flags`` says which are there)
    s  = max |x'| / 448             (1 below 2**-126)
    u  = e4m3(x' * (1 / s)), columns k..kp-1 are 0

How 16 floats become 16 codes, for the magnitude a, at most 448:

* from 2**-6 on, the top 12 bits of the float32, rounded to nearest even by adding half of what is cut off (and the bit
  above it, minus one), are the exponent and three bits of mantissa; 120 exponents less is the code, and a carry out of
  the mantissa lands in the exponent, as it should.
* below, a is a multiple of 2**-9 after rounding: a + 2**14 has its last bit there, and the machine rounds.

Back: a code is shifted into the bits of a float16 as in coded.py, times 2**8 s. NaN has the code 0x7F both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .quantize import LEAST_SCALE, UNROLL, Read, choose_affine, plain

LARGEST = 448.0
_CUT = 20  # bits of a float32's mantissa that E4M3 has not
_EXPONENTS = (127 - 7) << 3
_MAGIC = 0x46800000  # bits of 2**14
_INFINITY = 0x7F800000


def _splat(value: Any, lanes: int, dtype: str = "float32") -> Any:
    value = tirx.const(value, dtype) if isinstance(value, (int, float)) else value
    return value if lanes == 1 else T.broadcast(value, lanes)


def _typed(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def encoded(y: Any, lanes: int) -> Any:
    """Codes uint8 of values that are over their scale already."""
    kind = _typed("int32", lanes)

    def word(value: int) -> Any:
        return _splat(value, lanes, "int32")

    zero = _splat(0.0, lanes)
    y = bind(y)
    magnitude = bind(T.min(T.max(y, zero - y), _splat(LARGEST, lanes)))
    bits = bind(T.reinterpret(kind, magnitude))
    odd = (bits >> word(_CUT)) & word(1)
    normal = ((bits + word((1 << (_CUT - 1)) - 1) + odd) >> word(_CUT)) - word(_EXPONENTS)
    small = T.reinterpret(kind, magnitude + _splat(2.0**14, lanes)) - word(_MAGIC)
    code = T.Select(magnitude < _splat(2.0**-6, lanes), small, normal)
    code = code + T.Select(y < zero, word(128), word(0))
    number = (T.reinterpret(kind, y) & word(0x7FFFFFFF)) <= word(_INFINITY)  # TVM takes y == y for true
    return T.cast(T.Select(number, code, word(0x7F)), _typed("uint8", lanes))


def decoded(codes: Any, lanes: int) -> Any:
    """Values of codes uint8, float32."""
    kind = _typed("int16", lanes)

    def word(value: int) -> Any:
        return _splat(value, lanes, "int16")

    wide = bind(T.cast(codes, kind))
    low = bind(wide & word(0x7F))
    half = ((wide & word(0x80)) << word(8)) | (low << word(7))
    value = T.cast(T.reinterpret(_typed("float16", lanes), half), _typed("float32", lanes))
    return T.Select(low == word(0x7F), _splat(float("nan"), lanes), value * _splat(256.0, lanes))


def _largest(read: Read, k: Any) -> Any:
    """The largest magnitude of a row."""
    top = registers(UNROLL, "float32")
    for i in range(UNROLL):
        store(top, 16 * i, _splat(0.0, 16))

    def seen(value: Any, old: Any, lanes: int) -> Any:
        value = bind(value)
        return T.max(old, T.max(value, _splat(0.0, lanes) - value))

    chunk = 16 * UNROLL
    with for_range(0, k // chunk) as c:
        for i in range(UNROLL):
            store(top, 16 * i, seen(read(c * chunk + 16 * i, 16), load(top, 16 * i), 16))
    done = bind(k // chunk * chunk)
    with for_range(0, (k - done) // 16) as c:
        store(top, 0, seen(read(done + c * 16, 16), load(top, 0), 16))
    for i in range(1, UNROLL):
        store(top, 0, T.max(load(top, 0), load(top, 16 * i)))
    # A scratch of its own for the narrow accesses: they would keep the accumulators of the loop out of registers.
    fold = registers(1, "float32")
    store(fold, 0, load(top, 0))
    for width in (8, 4, 2, 1):
        store(fold, 0, T.max(load(fold, 0, width), load(fold, width, width)), width)
    vectors = bind(k // 16 * 16)
    with for_range(0, k - vectors) as j:
        store(fold, 0, seen(read(vectors + j, 1), load(fold, 0, 1), 1), 1)
    return bind(load(fold, 0, 1))


def _write(read: Read, k: Any, u: Any, out: Any, kp: Any, s: Any) -> None:
    """u[out : out + kp] = codes of the row, zeros after."""
    inverse = bind(T.float32(1.0) / s)
    with for_range(0, k // 16) as c:
        store(u, out + c * 16, encoded(read(c * 16, 16) * _splat(inverse, 16), 16), 16)
    vectors = bind(k // 16 * 16)
    with for_range(vectors, k) as j:
        store(u, out + j, encoded(read(j, 1) * inverse, 1), 1)
    with for_range(k, kp) as j:
        store(u, out + j, T.uint8(0), 1)


def _quantize_rows(
    isa: Isa,
    x: Any, shift: Any, scale: Any, u: Any, params: Any, rows: Any, k: Any, kp: Any, flags: Any,
) -> None:  # fmt: skip
    def body(wrap: Callable[[Read], Read]) -> None:
        with for_range(0, rows) as m:
            read = wrap(plain(x, m * k))
            found = bind(_largest(read, k) / T.float32(LARGEST))
            s = bind(T.Select(found < T.float32(LEAST_SCALE), T.float32(1.0), found))
            store(params, m, s, 1)
            _write(read, k, u, m * kp, kp, s)

    choose_affine(flags, shift, scale, body)


def _quantize_rows_static(
    isa: Isa,
    x: Any, shift: Any, scale: Any, u: Any, params: Any, rows: Any, k: Any, kp: Any, flags: Any,
) -> None:  # fmt: skip
    s = bind(load(params, 0, 1))

    def body(wrap: Callable[[Read], Read]) -> None:
        with for_range(0, rows) as m:
            _write(wrap(plain(x, m * k)), k, u, m * kp, kp, s)

    choose_affine(flags, shift, scale, body)


def _decode_rows(isa: Isa, u: Any, params: Any, stride: Any, out: Any, rows: Any, k: Any, kp: Any) -> None:
    """out[rows, k] = s value[u]; the scale of row m is params[m * stride]."""
    with for_range(0, rows) as m:
        s = bind(load(params, m * stride, 1))
        with for_range(0, k // 16) as c:
            at = bind(c * 16)
            store(out, m * k + at, decoded(load(u, m * kp + at, 16), 16) * _splat(s, 16), 16)
        with for_range(k // 16 * 16, k) as j:
            store(out, m * k + j, decoded(load(u, m * kp + j, 1), 1) * s, 1)


def _signature(params: str) -> str:
    vectors = "x: const f32*, shift: const f32*, scale: const f32*"
    return f"{vectors}, u: u8*, params: {params}, rows: i64, k: i64, kp: i64, flags: i64"


KERNELS = [
    Kernel("fp8_quantize_rows", _signature("f32*"), _quantize_rows, "fp8"),
    Kernel("fp8_quantize_rows_static", _signature("const f32*"), _quantize_rows_static, "fp8"),
    Kernel(
        "fp8_decode_rows",
        "u: const u8*, params: const f32*, stride: i64, out: f32*, rows: i64, k: i64, kp: i64",
        _decode_rows,
        "fp8",
    ),
]
