"""Small kernels: `activation(gate) * up` over a range of elements, one per activation; transpose."""

from __future__ import annotations

from functools import partial
from typing import Any

from .codegen import Isa, Kernel, bind, for_range, load, store
from .math import ACTIVATIONS, activate, transpose16


def _gated(isa: Isa, gate: Any, up: Any, y: Any, begin: Any, end: Any, *, activation: str) -> None:
    del isa
    vectors = (end - begin) // 16
    with for_range(0, vectors) as i:
        at = begin + i * 16
        store(y, at, activate(load(gate, at), activation) * load(up, at))
    with for_range(begin + vectors * 16, end) as i:
        store(y, i, activate(load(gate, i, 1), activation) * load(up, i, 1), 1)


def _transpose(isa: Isa, x: Any, y: Any, rows: Any, columns: Any, x_row: Any, y_row: Any) -> None:
    """y[c, r] = x[r, c]."""
    del isa
    whole_rows, whole_columns = bind(rows // 16 * 16), bind(columns // 16 * 16)

    def copy(r: Any, c: Any) -> None:
        store(y, c * y_row + r, load(x, r * x_row + c, 1), 1)

    with for_range(0, rows // 16) as i, for_range(0, columns // 16) as j:
        block = [bind(load(x, (i * 16 + r) * x_row + j * 16)) for r in range(16)]
        for c, column in enumerate(transpose16(block)):
            store(y, (j * 16 + c) * y_row + i * 16, column)
    with for_range(whole_columns, columns) as c, for_range(0, whole_rows) as r:
        copy(r, c)
    with for_range(whole_rows, rows) as r, for_range(0, columns) as c:
        copy(r, c)


KERNELS = [
    Kernel(
        f"gated_{activation}",
        "gate: const f32*, up: const f32*, y: f32*, begin: i64, end: i64",
        partial(_gated, activation=activation),
        "elementwise",
    )
    for activation in ACTIVATIONS
]
KERNELS.append(
    Kernel(
        "transpose",
        "x: const f32*, y: f32*, rows: i64, columns: i64, x_row: i64, y_row: i64",
        _transpose,
        "elementwise",
    )
)
