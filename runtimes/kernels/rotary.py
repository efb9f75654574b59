"""Rotary position embedding of `count` rows of D floats, R of which turn.

Half-split pairs:

    y[i]       = x[i]       cos[i]       - x[i + R/2] sin[i]
    y[i + R/2] = x[i + R/2] cos[i + R/2] + x[i]       sin[i + R/2]

Interleaved pairs:

    y[2i]     = x[2i]     cos[2i]     - x[2i + 1] sin[2i]
    y[2i + 1] = x[2i + 1] cos[2i + 1] + x[2i]     sin[2i + 1]

Rows are `x_step` floats apart in x and y, `table_step` floats apart in cos and sin (0: all rows share one).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .codegen import Isa, Kernel, bind, for_range, load, store
from .math import shuffle


def _half_split(x: Any, cos: Any, sin: Any, y: Any, at: Any, table: Any, rotated: Any) -> None:
    half = bind(rotated // 2)

    def body(i: Any, lanes: int) -> None:
        first, second = bind(load(x, at + i, lanes)), bind(load(x, at + half + i, lanes))
        turned = first * load(cos, table + i, lanes) - second * load(sin, table + i, lanes)
        store(y, at + i, turned, lanes)
        turned = second * load(cos, table + half + i, lanes) + first * load(sin, table + half + i, lanes)
        store(y, at + half + i, turned, lanes)

    with for_range(0, half // 16) as block:
        body(block * 16, 16)
    with for_range(half // 16 * 16, half) as i:
        body(i, 1)


def _interleaved(x: Any, cos: Any, sin: Any, y: Any, at: Any, table: Any, rotated: Any) -> None:
    with for_range(0, rotated // 16) as block:
        i = block * 16
        value = bind(load(x, at + i))
        straight = bind(value * load(cos, table + i))
        swapped = shuffle(value, value, [lane ^ 1 for lane in range(16)])
        crossed = bind(swapped * load(sin, table + i))
        signs = [16 + lane if lane % 2 == 0 else lane for lane in range(16)]
        store(y, at + i, shuffle(bind(straight + crossed), bind(straight - crossed), signs))
    with for_range(rotated // 16 * 8, rotated // 2) as pair:
        i = pair * 2
        first, second = bind(load(x, at + i, 1)), bind(load(x, at + i + 1, 1))
        turned = first * load(cos, table + i, 1) - second * load(sin, table + i, 1)
        store(y, at + i, turned, 1)
        turned = second * load(cos, table + i + 1, 1) + first * load(sin, table + i + 1, 1)
        store(y, at + i + 1, turned, 1)


def _rotary(
    isa: Isa,
    x: Any, cos: Any, sin: Any, y: Any,
    count: Any, x_step: Any, table_step: Any, rotated: Any, d: Any,
    *, interleaved: bool,
) -> None:  # fmt: skip
    del isa
    rotate = _interleaved if interleaved else _half_split
    with for_range(0, count) as row:
        at, table = bind(row * x_step), bind(row * table_step)
        rotate(x, cos, sin, y, at, table, rotated)
        with for_range(0, (d - rotated) // 16) as block:
            store(y, at + rotated + block * 16, load(x, at + rotated + block * 16))
        with for_range(rotated + (d - rotated) // 16 * 16, d) as i:
            store(y, at + i, load(x, at + i, 1), 1)


_SIGNATURE = (
    "x: const f32*, cos: const f32*, sin: const f32*, y: f32*, "
    "count: i64, x_step: i64, table_step: i64, rotated: i64, d: i64"
)

KERNELS = [
    Kernel("rotary_half", _SIGNATURE, partial(_rotary, interleaved=False), "elementwise"),
    Kernel("rotary_interleaved", _SIGNATURE, partial(_rotary, interleaved=True), "elementwise"),
]
