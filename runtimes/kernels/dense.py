"""Dense float32 linears: ``t[m, n] = sum_k x[m, k] w[n, k]``, w packed in panels of 32 features.

Identity: ``panels[b, k, j] = w[32 b + j, k]`` (zero where there is no such feature), so that a step of K is two
loads from consecutive memory, for any K. Bias, activation, residual and the ragged edge in N are the work of
``epilogue_g_*`` of linear.py, as for every linear on float activations.

``dense_block`` multiplies any number of rows by one panel: tiles of `dense_rows` rows (a knob), whose sums stay in
registers (a step of K is 2 loads, R broadcasts and 2 R multiply-adds), then one smaller tile of exactly the rows
that are left, so that 5 rows read the weights once. Tiles of few rows have more than one chain of sums for each
output: a multiply-add waits 4 cycles for itself, and two start in each. ``ldw`` is the distance of two steps of K: 32
in packed weights, and the row length where the right side is an activation with its columns next to each other.

Everything is 16 lanes wide with no intrinsics: LLVM halves it for v3, whose 16 registers hold 6 rows of 16 columns.
"""

from __future__ import annotations

from typing import Any

from .codegen import Isa, Kernel, T, bind, for_range, load, registers, store, when
from .knobs import knob
from .linear import prefetch, prefetch_stream

PANEL = 32
"""Features of a panel of packed weights."""

FEW = 2
"""Tiles of up to this many rows wait for memory: they prefetch far ahead in the weights' own stream."""


def _unroll(count: int) -> int:
    """Steps of K in one round of the loop. One for large tiles: LLVM would collect the loads of several steps at
    its beginning, and spill them (half the speed for 12 rows in rounds of 2)."""
    return knob("dense_unroll") if count <= 4 else 1


def _dense_block(
    isa: Isa, x: Any, ldx: Any, w: Any, ldw: Any, inputs: Any, ahead: Any, t: Any, rows: Any, accumulate: Any
) -> None:
    """t[r, 0:32] = (accumulate: +=) x[r, :] @ w for all rows; w is ``[inputs, 32]`` with rows ldw apart."""
    most = knob("dense_rows")

    def tile(count: int, row0: Any, fetch: Any) -> None:
        wide = 2 if isa.registers == 32 or count <= 2 else 1
        for half in range(0, 2, wide):
            _tile(isa, count, wide, half * 16, (x, ldx, w, ldw, inputs), (t, accumulate), row0, fetch)

    whole = bind(rows // most)
    stride = bind(T.int64(PANEL) // T.max(whole, T.int64(1)))
    with for_range(0, whole) as i:
        tile(most, i * most, (ahead, i * inputs, stride))
    left = bind(rows - whole * most)
    for count in range(1, most):
        with when(left == T.int64(count)):
            tile(count, whole * most, None)


def _tile(
    isa: Isa,
    count: int,
    wide: int,
    column: int,
    factors: tuple[Any, ...],
    sums: tuple[Any, Any],
    row0: Any,
    fetch: tuple[Any, Any, Any] | None,
) -> None:
    x, ldx, w, ldw, inputs = factors
    t, accumulate = sums
    unroll = _unroll(count)
    ways = max(1, min(unroll, 8 // (count * wide)))
    acc = registers(count * wide * ways, "float32")
    zero = T.broadcast(T.float32(0), 16)
    for i in range(count * wide * ways):
        store(acc, i * 16, zero)
    first = bind(row0 * ldx)

    def step(k: Any, way: int) -> None:
        weights = [bind(load(w, k * ldw + column + v * 16)) for v in range(wide)]
        for r in range(count):
            value = bind(T.broadcast(load(x, first + ldx * r + k, 1), 16))
            for v in range(wide):
                i = ((way * count + r) * wide + v) * 16
                store(acc, i, T.fma(value, weights[v], load(acc, i)))

    with for_range(0, inputs // unroll) as block:
        if count <= FEW:
            for i in range(unroll * wide):
                prefetch_stream(w, (block * unroll + i // wide) * ldw + column + i % wide * 16, 4)
        elif fetch is not None and column == 0:
            for line in (0, 16):
                prefetch(fetch[0], (fetch[1] + block * unroll) * fetch[2] + line, 3)
        for j in range(unroll):
            step(block * unroll + j, j % ways)
    with for_range(inputs // unroll * unroll, inputs) as k:
        step(k, 0)
    for r in range(count):
        for v in range(wide):
            parts = [load(acc, ((way * count + r) * wide + v) * 16) for way in range(ways)]
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            total, at = bind(parts[0]), (row0 + r) * PANEL + column + v * 16
            with T.If(accumulate != T.int32(0)):
                with T.Then():
                    store(t, at, total + load(t, at))
                with T.Else():
                    store(t, at, total)


_SIGNATURE = (
    "x: const f32*, ldx: i64, w: const f32*, ldw: i64, inputs: i64, ahead: const f32*, t: f32*, rows: i64"
)

KERNELS = [Kernel("dense_block", f"{_SIGNATURE}, accumulate: i32", _dense_block, "linear_dense")]
