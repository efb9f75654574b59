"""Decode rows of a packed embedding: int8 `[V, D]` or int4 `[V, ceil(D, 2) / 2]`, low nibble = even index.

    y[i] = scale[i // group] * (w[i] - zero[i // group])

One call decodes one row; `group` is the number of elements per scale (D when there is one group). The zero
point is a pointer with a flag, since most tables are symmetric.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, store
from .math import shuffle


def _signed_nibbles(packed: Any, lanes: int) -> tuple[Any, Any]:
    """Low and high nibbles of uint8 lanes as float32, two's complement."""
    suffix = "" if lanes == 1 else f"x{lanes}"

    def constant(value: int) -> Any:
        return T.int32(value) if lanes == 1 else T.broadcast(T.int32(value), lanes)

    wide = bind(T.cast(packed, "int32" + suffix))
    low = T.shift_right(T.shift_left(wide, constant(28)), constant(28))
    high = T.shift_right(T.shift_left(wide, constant(24)), constant(28))
    return T.cast(low, "float32" + suffix), T.cast(high, "float32" + suffix)


def _groups(d: Any, group: Any, scale: Any, zero: Any, has_zero: Any, body: Any) -> None:
    with for_range(0, (d + group - 1) // group) as g:
        begin, end = bind(g * group), bind(tirx.min(g * group + group, d))
        factor = bind(load(scale, g, 1))
        shift = T.alloc_buffer((1,), "float32", scope="local", layout=None)
        store(shift, 0, T.float32(0.0), 1)
        with T.If(has_zero != 0), T.Then():
            store(shift, 0, T.cast(load(zero, g, 1), "float32"), 1)
        body(begin, end, factor, bind(load(shift, 0, 1)))


def _int8(isa: Isa, weight: Any, scale: Any, zero: Any, y: Any, d: Any, group: Any, has_zero: Any) -> None:
    del isa

    def body(begin: Any, end: Any, factor: Any, shift: Any) -> None:
        vectors = bind((end - begin) // 16)
        with for_range(0, vectors) as block:
            code = T.cast(load(weight, begin + block * 16), "float32x16")
            store(y, begin + block * 16, (code - T.broadcast(shift, 16)) * T.broadcast(factor, 16))
        with for_range(begin + vectors * 16, end) as i:
            store(y, i, (T.cast(load(weight, i, 1), "float32") - shift) * factor, 1)

    _groups(d, group, scale, zero, has_zero, body)


def _int4(isa: Isa, weight: Any, scale: Any, zero: Any, y: Any, d: Any, group: Any, has_zero: Any) -> None:
    del isa

    def body(begin: Any, end: Any, factor: Any, shift: Any) -> None:
        # A group that starts at an odd index (odd group size) has no whole bytes of its own: one at a time.
        vectors = bind(T.Select(begin % 2 == 0, (end - begin) // 32, tirx.const(0, "int64")))
        with for_range(0, vectors) as block:
            low, high = _signed_nibbles(load(weight, begin // 2 + block * 16), 16)
            low = bind((low - T.broadcast(shift, 16)) * T.broadcast(factor, 16))
            high = bind((high - T.broadcast(shift, 16)) * T.broadcast(factor, 16))
            for half in range(2):
                order = [8 * half + lane // 2 + 16 * (lane % 2) for lane in range(16)]
                store(y, begin + block * 32 + 16 * half, shuffle(low, high, order))
        with for_range(begin + vectors * 32, end) as i:
            low, high = _signed_nibbles(load(weight, i // 2, 1), 1)
            store(y, i, (T.Select(i % 2 == 0, low, high) - shift) * factor, 1)

    _groups(d, group, scale, zero, has_zero, body)


def _signature(code: str) -> str:
    return (
        f"weight: const {code}*, scale: const f32*, zero: const i8*, y: f32*, "
        "d: i64, group: i64, has_zero: i64"
    )


KERNELS = [
    Kernel("embedding_row_int8", _signature("i8"), _int8, "elementwise"),
    Kernel("embedding_row_int4", _signature("u8"), _int4, "elementwise"),
]
