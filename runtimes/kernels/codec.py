"""Codecs: how packed weights of 2, 3 and 4 bits become vectors of signed bytes, in registers.

A *block* is 32 inputs of one panel (16 output features), ``bits`` vectors of 64 bytes; it decodes to 8 *steps*, the
weight vectors of 4 consecutive inputs each, that `dot.py` multiplies (layouts: docs/dialect.md). On v3 a vector is
half a panel, 32 bytes.

A code that is brought to the top of its byte is ``code * 2^(8 - bits)`` with its sign, so decoding is a shift and a
mask, and the scale absorbs the *unit* (:func:`unit`). On v3 sixteen-bit sums of eight such products would overflow:
codes are brought to the bottom instead, and a byte shuffle extends the sign (int4: an exclusive or and a
subtraction).

Operations on a 64-byte vector to decode a block, v4: int4 12 (8 masks, 4 shifts), int2 14 (8 masks, 6 shifts), int3
17 (8 masks, 7 shifts, 2 selections), beside 8 dot products and 8 broadcasts of activations for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from .codegen import Isa, T, bind
from .dot import lanes, unpack_int4

Load = Callable[[int], Any]
"""Vector i of a block, as uint8."""


def unit(isa: Isa, bits: int) -> int:
    """What the decoded codes are multiplied by."""
    return 1 << (8 - bits) if isa.vnni else 1


@dataclass(frozen=True)
class Codec:
    """One width. ``decode(isa, load)`` yields (step, int8 vector in units of :func:`unit`) for the 8 steps of a block;
    it calls ``load(i)`` for each of its ``bits`` vectors once, in order, when it first needs it."""

    bits: int
    decode: Callable[[Isa, Load], Iterator[tuple[int, Any]]]


def _bytes(value: int, isa: Isa, dtype: str = "uint8") -> Any:
    return T.broadcast(tirx.const(value, dtype), 4 * lanes(isa))


def _shift(isa: Isa, packed: Any, left: int) -> Any:
    """Shift all bytes left (right where negative); bits of the neighbouring byte come in and must be masked off."""
    if left == 0:
        return packed
    n = 2 * lanes(isa)
    wide, by = T.reinterpret(f"uint16x{n}", packed), T.broadcast(tirx.const(abs(left), "uint16"), n)
    return T.reinterpret(f"uint8x{2 * n}", wide << by if left > 0 else wide >> by)


def _signed(isa: Isa, bits: int, code: Any) -> Any:
    """Masked codes as int8: they are at the top of their bytes on v4, at the bottom on v3."""
    signed = T.reinterpret(f"int8x{4 * lanes(isa)}", code)
    if isa.vnni:
        return bind(signed)
    table = bytes((v - ((v >> (bits - 1)) << bits)) & 255 for v in range(1 << bits)) * (8 >> bits)
    eight = tirx.const(int.from_bytes(table, "little", signed=True), "int64")
    spread = T.reinterpret("int8x32", T.broadcast(eight, 4))
    return bind(T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.pshuf.b", spread, signed))


def _field(isa: Isa, bits: int, packed: Any, low: int) -> Any:
    """The codes whose lowest bit is bit ``low`` of each byte."""
    if isa.vnni:
        mask = _bytes(256 - unit(isa, bits), isa)
        return _signed(isa, bits, _shift(isa, packed, 8 - bits - low) & mask)
    return _signed(isa, bits, _shift(isa, packed, -low) & _bytes((1 << bits) - 1, isa))


def _decode2(isa: Isa, load: Load) -> Iterator[tuple[int, Any]]:
    for i in range(2):
        packed = load(i)
        for q in range(4):
            yield 4 * i + q, _field(isa, 2, packed, 2 * q)


def _decode3(isa: Isa, load: Load) -> Iterator[tuple[int, Any]]:
    planes = []
    for p in range(3):
        planes.append(load(p))
        yield 2 * p, _field(isa, 3, planes[p], 5)
        yield 2 * p + 1, _field(isa, 3, planes[p], 2)
    top = 7 if isa.vnni else 2
    sign, below = _bytes(1 << top, isa), _bytes(3 << (top - 2), isa)
    for i in range(2):
        low = _shift(isa, planes[i], top - 2) & below
        yield 6 + i, _signed(isa, 3, low | (_shift(isa, planes[2], top - i) & sign))


def _decode4(isa: Isa, load: Load) -> Iterator[tuple[int, Any]]:
    for i in range(4):
        for h, half in enumerate(unpack_int4(isa, load(i))):
            yield 2 * i + h, half


CODECS = {codec.bits: codec for codec in (Codec(2, _decode2), Codec(3, _decode3), Codec(4, _decode4))}
"""Width → codec."""
