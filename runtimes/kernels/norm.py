"""Residual add, layer or RMS norm, and the activation quantizer, in one pass over rows.

    total = x + residual
    y = (total - mean) / sqrt(mean((total - mean)^2) + eps) * weight + bias        (RMS: mean = 0)
    u, (s, z) = quantize((y - shift) * scale)               (docs/dialect.md, "Quantization")

A row stays in the first-level cache between its sweeps: sum, squared deviations (two sweeps, because the
one-sweep formula cancels), normalize with the range, quantize; shift and scale of the quantizer are a sweep of
their own, as y may be a result. Optional inputs and outputs are bits of `flags`: a test per row, never per element.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add
from typing import Any

from tvm import tirx

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .math import reduce_lanes
from .quantize import pair_of, plain, write_codes

RESIDUAL, WEIGHT, BIAS, SUM, RESULT, QUANTIZE, STATIC, RMS, SHIFT, SCALE = (1 << bit for bit in range(10))
"""Bits of `flags`: inputs that are there, outputs that are wanted, a given pair, the kind of norm."""

_WAYS = 4  # independent accumulators, to hide the latency of additions


class _Accumulator:
    """A reduction over a row: four vectors and a scalar for the last elements."""

    def __init__(self, start: float, combine: Callable[[Any, Any], Any]) -> None:
        self.start, self.combine = start, combine
        self.vectors = registers(_WAYS, "float32")
        self.scalar = registers(1, "float32", 1)
        self.reset()

    def reset(self) -> None:
        for way in range(_WAYS):
            store(self.vectors, 16 * way, T.broadcast(T.float32(self.start), 16))
        store(self.scalar, 0, T.float32(self.start), 1)

    def update(self, way: int, lanes: int, step: Callable[[Any], Any]) -> None:
        """Replace an accumulator by `step` of it."""
        buffer, at = (self.vectors, 16 * way) if lanes > 1 else (self.scalar, 0)
        store(buffer, at, step(load(buffer, at, lanes)), lanes)

    def result(self) -> Any:
        parts = [load(self.vectors, 16 * way) for way in range(_WAYS)]
        while len(parts) > 1:
            parts = [self.combine(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
        return bind(self.combine(reduce_lanes(bind(parts[0]), self.combine), load(self.scalar, 0, 1)))


def sweep(count: Any, body: Callable[[Any, int, int], None]) -> None:
    """`body(offset, lanes, way)` over 0..count: four vectors at a time, single vectors, then scalars."""
    with for_range(0, count // (16 * _WAYS)) as block:
        for way in range(_WAYS):
            body(block * (16 * _WAYS) + 16 * way, 16, way)
    with for_range(count // (16 * _WAYS) * _WAYS, count // 16) as block:
        body(block * 16, 16, 0)
    with for_range(count // 16 * 16, count) as i:
        body(i, 1, 0)


def _spread(value: Any, lanes: int) -> Any:
    return value if lanes == 1 else T.broadcast(value, lanes)


def _choose(flags: Any, bits: list[int], body: Callable[[list[bool]], None], chosen: list[bool]) -> None:
    """Branch on each bit of `flags`; `body` is emitted for every combination."""
    if not bits:
        body(chosen)
        return
    with T.If(T.bitwise_and(flags, tirx.const(bits[0], "int64")) != 0):
        with T.Then():
            _choose(flags, bits[1:], body, [*chosen, True])
        with T.Else():
            _choose(flags, bits[1:], body, [*chosen, False])


def _rows(
    isa: Isa,
    x: Any, residual: Any, weight: Any, bias: Any, pair: Any, shift_by: Any, scale_by: Any,
    total: Any, y: Any, u: Any, params: Any, row: Any,
    k: Any, kp: Any, begin: Any, end: Any, flags: Any, eps: Any, levels: Any,
) -> None:  # fmt: skip

    def is_set(bit: int) -> Any:
        return T.bitwise_and(flags, tirx.const(bit, "int64")) != 0

    sums, squares = _Accumulator(0.0, add), _Accumulator(0.0, add)
    lowest, highest = _Accumulator(0.0, tirx.min), _Accumulator(0.0, tirx.max)
    moments = registers(1, "float32", 2)  # mean, variance
    inverse_k = bind(T.float32(1.0) / T.cast(k, "float32"))
    with for_range(begin, end) as r:
        at = bind(r * k)
        for accumulator in (sums, squares, lowest, highest):
            accumulator.reset()

        def read(chosen: list[bool], at: Any = at) -> None:
            has_residual, wants_sum = chosen

            def body(i: Any, lanes: int, way: int) -> None:
                value = load(x, at + i, lanes)
                value = bind(value + load(residual, at + i, lanes) if has_residual else value)
                store(row, i, value, lanes)
                if wants_sum:
                    store(total, at + i, value, lanes)
                sums.update(way, lanes, lambda old: old + value)
                squares.update(way, lanes, lambda old: T.fma(value, value, old))

            sweep(k, body)

        _choose(flags, [RESIDUAL, SUM], read, [])
        with T.If(is_set(RMS)):
            with T.Then():
                store(moments, 0, T.float32(0.0), 1)
                store(moments, 1, squares.result() * inverse_k, 1)
            with T.Else():
                mean = bind(sums.result() * inverse_k)
                sums.reset()
                squares.reset()

                def deviation(i: Any, lanes: int, way: int, mean: Any = mean) -> None:
                    d = bind(load(row, i, lanes) - _spread(mean, lanes))
                    sums.update(way, lanes, lambda old: old + d)
                    squares.update(way, lanes, lambda old: T.fma(d, d, old))

                sweep(k, deviation)
                # What is left of the sum is the rounding error of the mean: it matters far from zero.
                shift = bind(sums.result() * inverse_k)
                store(moments, 0, mean + shift, 1)
                store(moments, 1, squares.result() * inverse_k - shift * shift, 1)
        centre = bind(load(moments, 0, 1))
        factor = bind(T.float32(1.0) / T.sqrt(load(moments, 1, 1) + eps))

        def normalize(chosen: list[bool], at: Any = at, centre: Any = centre, factor: Any = factor) -> None:
            has_weight, has_bias, wants_result = chosen

            def body(i: Any, lanes: int, way: int) -> None:
                value = (load(row, i, lanes) - _spread(centre, lanes)) * _spread(factor, lanes)
                value = value * load(weight, i, lanes) if has_weight else value
                value = bind(value + load(bias, i, lanes) if has_bias else value)
                store(row, i, value, lanes)
                if wants_result:
                    store(y, at + i, value, lanes)
                lowest.update(way, lanes, lambda old: tirx.min(old, value))
                highest.update(way, lanes, lambda old: tirx.max(old, value))

            sweep(k, body)

        _choose(flags, [WEIGHT, BIAS, RESULT], normalize, [])

        def transform(chosen: list[bool]) -> None:
            has_shift, has_scale = chosen
            if not (has_shift or has_scale):
                return
            lowest.reset()
            highest.reset()

            def body(i: Any, lanes: int, way: int) -> None:
                value = load(row, i, lanes)
                value = value - load(shift_by, i, lanes) if has_shift else value
                value = bind(value * load(scale_by, i, lanes) if has_scale else value)
                store(row, i, value, lanes)
                lowest.update(way, lanes, lambda old: tirx.min(old, value))
                highest.update(way, lanes, lambda old: tirx.max(old, value))

            sweep(k, body)

        _choose(flags, [SHIFT, SCALE], transform, [])
        moved = plain(row, tirx.const(0, "int64"))
        with when(is_set(QUANTIZE)), T.If(is_set(STATIC)):
            with T.Then():
                scale, zero = bind(load(pair, 0, 1)), bind(load(pair, 1, 1))
                write_codes(isa, moved, k, u, r * kp, kp, scale, zero, levels)
            with T.Else():
                scale, zero = pair_of(lowest.result(), highest.result(), levels)
                store(params, r * 2, scale, 1)
                store(params, r * 2 + 1, zero, 1)
                write_codes(isa, moved, k, u, r * kp, kp, scale, zero, levels)


KERNELS = [
    # rows begin..end of x [rows, k]; `row` is scratch of k floats
    Kernel(
        "norm_rows",
        "x: const f32*, residual: const f32*, weight: const f32*, bias: const f32*, pair: const f32*, "
        "shift: const f32*, scale: const f32*, "
        "total: f32*, y: f32*, u: u8*, params: f32*, row: f32*, "
        "k: i64, kp: i64, begin: i64, end: i64, flags: i64, eps: f32, levels: f32",
        _rows,
        "norm",
    ),
]
