"""Hadamard transforms of rows, factor by factor (`compiler.hadamard`); `hadamard_driver.h` puts the steps together.

A block is [order, inner] for a core of `order` rows, and `width` consecutive floats for a power of two:

    hadamard_core      y[j, i] = scale sum_k H[k, j] x[k, i]       inner a multiple of 4: vectors along i
    hadamard_columns   the same for any inner: vectors along j, then one element at a time
    hadamard_first     the lowest stages of a power of two: up to `span` elements, in registers
    hadamard_next      further stages, in place: butterflies of `radix` vectors `stride` floats apart

The stages inside a vector are x -> sign x + shuffled x, a shuffle and a multiply-add. Sixteen vectors (on v3
eight of 8 lanes) go through eight (six) stages between one load and one store, so that 4096 elements pass the
first-level cache twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from ...compiler.hadamard_orders import CORES, signs
from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store
from .math import shuffle
from .quantize import Read, choose_affine, plain

_OUTPUTS = 4  # rows of a core at a time; orders are multiples of 4


def _lanes(isa: Isa) -> int:
    """Floats in a register: twice as many would spill on v3."""
    return 16 if isa.vnni else 8


def _spread(value: Any, lanes: int) -> Any:
    return T.broadcast(value, lanes)


def _sign(lanes: int, stride: int) -> Any:
    """+1 in lanes whose index has the bit `stride` clear, -1 in the others."""
    plus, minus = _spread(T.float32(1.0), lanes), _spread(T.float32(-1.0), lanes)
    return shuffle(plus, minus, [i + lanes * (i & stride != 0) for i in range(lanes)])


def _inside(value: Any, lanes: int) -> Any:
    """All stages between the lanes of one vector."""
    stride = 1
    while stride < lanes:
        partner = shuffle(value, value, [i ^ stride for i in range(lanes)])
        value = bind(T.fma(value, _sign(lanes, stride), partner))
        stride *= 2
    return value


def _between(values: list[Any]) -> list[Any]:
    """All stages between vectors."""
    stride = 1
    while stride < len(values):
        low = [i for i in range(len(values)) if not i & stride]
        sums = {i: bind(values[i] + values[i + stride]) for i in low}
        values = [sums[i] if i in sums else bind(values[i - stride] - values[i]) for i in range(len(values))]
        stride *= 2
    return values


def _choose(value: Any, options: list[int], body: Callable[[int], None]) -> None:
    """`body(option)` for the option that `value` is; the last where it is none of the others."""
    if len(options) == 1:
        body(options[0])
        return
    with T.If(value == tirx.const(options[0], "int64")):
        with T.Then():
            body(options[0])
        with T.Else():
            _choose(value, options[1:], body)


def _first(isa: Isa, x: Any, y: Any, blocks: Any, span: Any, scale: Any) -> None:
    lanes = _lanes(isa)

    def run(size: int) -> None:
        width = min(size, lanes)
        with for_range(0, blocks) as b:
            at = bind(b * size)
            values = []
            for i in range(0, size, width):
                value = bind(load(x, at + i, width) * _spread(scale, width))
                values.append(_inside(value, width))
            for i, value in enumerate(_between(values)):
                store(y, at + i * width, value, width)

    _choose(span, [2 ** (k + 1) for k in range((lanes * lanes).bit_length() - 1)], run)


def _next(isa: Isa, y: Any, blocks: Any, radix: Any, stride: Any) -> None:
    lanes = _lanes(isa)

    def run(size: int) -> None:
        with for_range(0, blocks) as b, for_range(0, stride // lanes) as v:
            at = bind(b * size * stride + v * lanes)
            values = [bind(load(y, at + i * stride, lanes)) for i in range(size)]
            for i, value in enumerate(_between(values)):
                store(y, at + i * stride, value, lanes)

    _choose(radix, [2 ** (k + 1) for k in range(lanes.bit_length() - 1)], run)


def _core(
    isa: Isa, x: Any, matrix: Any, y: Any, blocks: Any, order: Any, padded: Any, inner: Any, scale: Any
) -> None:
    lanes = _lanes(isa)
    wide = 4 if isa.vnni else 2

    def tile(at: Any, j: Any, vectors: int, lanes: int = lanes) -> None:
        sums = registers(_OUTPUTS * vectors, "float32", lanes)
        for i in range(_OUTPUTS * vectors):
            store(sums, i * lanes, _spread(T.float32(0.0), lanes), lanes)
        with for_range(0, order) as k:
            rows = [bind(load(x, at + k * inner + v * lanes, lanes)) for v in range(vectors)]
            for o in range(_OUTPUTS):
                factor = bind(_spread(load(matrix, k * padded + j + o, 1), lanes))
                for v, row in enumerate(rows):
                    i = (o * vectors + v) * lanes
                    store(sums, i, T.fma(row, factor, load(sums, i, lanes)), lanes)
        for o in range(_OUTPUTS):
            for v in range(vectors):
                value = load(sums, (o * vectors + v) * lanes, lanes) * _spread(scale, lanes)
                store(y, at + (j + o) * inner + v * lanes, value, lanes)

    with for_range(0, blocks) as b:
        begin = bind(b * order * inner)
        whole = bind(inner // (wide * lanes))
        with for_range(0, whole) as v, for_range(0, order // _OUTPUTS) as j:
            tile(begin + v * (wide * lanes), j * _OUTPUTS, wide)
        with for_range(whole * wide, inner // lanes) as v, for_range(0, order // _OUTPUTS) as j:
            tile(begin + v * lanes, j * _OUTPUTS, 1)
        for half in (width for width in (8, 4) if width < lanes):
            with for_range(0, inner // half % 2), for_range(0, order // _OUTPUTS) as j:
                tile(begin + inner // (2 * half) * (2 * half), j * _OUTPUTS, 1, half)


def _columns(
    isa: Isa, x: Any, matrix: Any, y: Any, blocks: Any, order: Any, padded: Any, inner: Any, scale: Any
) -> None:
    lanes = _lanes(isa)

    def tile(at: Any, j: Any, vectors: int) -> None:
        sums = registers(vectors, "float32", lanes)
        for v in range(vectors):
            store(sums, v * lanes, _spread(T.float32(0.0), lanes), lanes)
        with for_range(0, order) as k:
            factor = bind(_spread(load(x, at + k * inner, 1), lanes))
            for v in range(vectors):
                row = load(matrix, k * padded + j + v * lanes, lanes)
                store(sums, v * lanes, T.fma(row, factor, load(sums, v * lanes, lanes)), lanes)
        # An array of its own for the narrow accesses: they would keep the sums out of registers.
        result = registers(vectors, "float32", lanes)
        for v in range(vectors):
            store(result, v * lanes, load(sums, v * lanes, lanes) * _spread(scale, lanes), lanes)
        with for_range(0, T.min(tirx.const(vectors * lanes, "int64"), order - j)) as o:
            store(y, at + (j + o) * inner, load(result, o, 1), 1)

    def tiles(at: Any, begin: Any, vectors: int) -> None:
        end = bind(padded // (vectors * lanes) * (vectors * lanes))
        with for_range(0, (end - begin) // (vectors * lanes)) as t:
            tile(at, bind(begin + t * (vectors * lanes)), vectors)
        if vectors > 1:
            tiles(at, end, vectors // 2)

    with for_range(0, blocks) as b, for_range(0, inner) as i:
        tiles(bind(b * order * inner + i), tirx.const(0, "int64"), 4)


def _affine_row(isa: Isa, x: Any, shift: Any, scale: Any, y: Any, k: Any, flags: Any) -> None:
    del isa

    def body(wrap: Callable[[Read], Read]) -> None:
        read = wrap(plain(x, tirx.const(0, "int64")))
        with for_range(0, k // 16) as i:
            store(y, i * 16, read(i * 16, 16))
        with for_range(k // 16 * 16, k) as i:
            store(y, i, read(i, 1), 1)

    choose_affine(flags, shift, scale, body)


_MATRIX = (
    "x: const f32*, matrix: const f32*, y: f32*, blocks: i64, order: i64, padded: i64, inner: i64, scale: f32"
)
KERNELS = [
    Kernel("hadamard_core", _MATRIX, _core, "hadamard"),
    Kernel("hadamard_columns", _MATRIX, _columns, "hadamard"),
    # span 2, 4, ..., 256 (v4) or 64 (v3)
    Kernel(
        "hadamard_first", "x: const f32*, y: f32*, blocks: i64, span: i64, scale: f32", _first, "hadamard"
    ),
    # radix 2, 4, 8 or 16 (v4 only), stride at least 64 (256 on v4)
    # (x - shift) * scale, for a transform between it and the quantizer; flags as in quantize.py
    Kernel(
        "affine_row",
        "x: const f32*, shift: const f32*, scale: const f32*, y: f32*, k: i64, flags: i64",
        _affine_row,
        "hadamard",
    ),
    Kernel("hadamard_next", "y: f32*, blocks: i64, radix: i64, stride: i64", _next, "hadamard"),
]


def signs_header() -> str:
    """`hadamard_signs.h`: the cores of `compiler.hadamard_orders`, row by row, a bit for each entry (1 is -1)."""
    lines = ["// Generated by isofold; do not edit.", "#ifndef ISOFOLD_HADAMARD_SIGNS_H"]
    lines += ["#define ISOFOLD_HADAMARD_SIGNS_H", "#include <stdint.h>"]
    for order in CORES:
        packed = np.packbits(signs(order).reshape(-1) < 0, bitorder="little").tobytes()
        lines.append(f"static const uint8_t isofold_signs_{order}[] = {{{','.join(map(str, packed))}}};")
    lines.append("static const struct { int64_t order; const uint8_t* bits; } isofold_hadamard_signs[] = {")
    lines += [f"  {{{order}, isofold_signs_{order}}}," for order in CORES]
    lines += ["};", f"enum {{ ISOFOLD_HADAMARD_CORES = {len(CORES)} }};", "#endif", ""]
    return "\n".join(lines)
