"""Dot products of unsigned 8-bit activations with signed 8-bit or 4-bit weights, exact in int32.

One *vector* here is ``lanes`` output features times 4 consecutive inputs: 64 bytes on v4 (16 features), 32
bytes on v3 (8 features: half a panel). The activation is a 32-bit word of 4 consecutive inputs, broadcast to
every feature.

* v4: one ``vpdpbusd``.
* v3, any int8 weight (``wide``): ``vpmaddubsw`` would saturate (255 * 127 * 2 > 32767), so even and odd bytes
  are widened to 16 bits and each pair is multiplied by ``vpmaddwd``, which is exact.
* v3, weights of at most 4 bits (``small``, codes in -8..7): ``vpmaddubsw`` cannot saturate, and neither can the
  16-bit sum of eight of them (8 * 2 * 255 * 8 = 32640 < 32768); one ``vpmaddwd`` by ones widens that sum.

Four-bit codes come out of a byte as ``16 w`` on v4 (a shift and a mask; a mask alone for the high nibble) and
as ``w`` on v3 (where 16 w would overflow the 16-bit sums); the scale absorbs the factor. `codec.py` has the other
widths.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .codegen import Isa, T, bind


def lanes(isa: Isa) -> int:
    """Output features in one vector of weights."""
    return 16 if isa.vnni else 8


def _int(value: int, dtype: str, count: int) -> Any:
    return T.broadcast(tirx.const(value, dtype), count)


def unpack_int4(isa: Isa, packed: Any) -> tuple[Any, Any]:
    """A vector of packed bytes (uint8) to two int8 vectors, inputs 0..3 and 4..7: 16 w on v4, w on v3."""
    n = 4 * lanes(isa)
    wide = T.reinterpret(f"uint16x{n // 2}", packed)
    mask = _int(0xF0, "uint8", n)
    if isa.vnni:
        low = T.reinterpret(f"uint8x{n}", wide << _int(4, "uint16", n // 2)) & mask
        return bind(T.reinterpret(f"int8x{n}", low)), bind(T.reinterpret(f"int8x{n}", packed & mask))
    nibble, sign = _int(0x0F, "uint8", n), _int(8, "int8", n)
    high = T.reinterpret(f"uint8x{n}", wide >> _int(4, "uint16", n // 2)) & nibble
    return tuple(bind((T.reinterpret(f"int8x{n}", v) ^ sign) - sign) for v in (packed & nibble, high))


def vpdpbusd(accumulator: Any, u: Any, weight: Any) -> Any:
    """``accumulator`` int32x16 plus the products of unsigned bytes (int32x16) and signed bytes (int8x64)."""
    name = "llvm.x86.avx512.vpdpbusd.512"
    return T.call_llvm_pure_intrin("int32x16", name, accumulator, T.reinterpret("int8x64", u), weight)


def vpmaddwd(a: Any, b: Any) -> Any:
    """Products of int16x16, summed in pairs to int32x8."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def vpmaddubsw(u: Any, weight: Any) -> Any:
    """Products of unsigned bytes (int32x8) and signed bytes (int8x32), summed in pairs to int16x16, saturating."""
    u = T.reinterpret("int8x32", u)
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", u, weight)


def ones() -> Any:
    """int16x16 of ones: the second factor that makes ``vpmaddwd`` a widening sum."""
    return _int(1, "int16", 16)


def split_weight(weight: Any) -> tuple[Any, Any]:
    """int8x32 to its even and its odd bytes, sign-extended to int16x16."""
    pairs = T.reinterpret("int16x16", weight)
    eight = _int(8, "int16", 16)
    return bind((pairs << eight) >> eight), bind(pairs >> eight)


def split_activation(u: Any) -> tuple[Any, Any]:
    """int32x8 of unsigned bytes to its even and its odd bytes, zero-extended to int16x16."""
    pairs = T.reinterpret("uint16x16", u)
    even = T.reinterpret("int16x16", pairs & _int(0xFF, "uint16", 16))
    return bind(even), bind(T.reinterpret("int16x16", pairs >> _int(8, "uint16", 16)))
