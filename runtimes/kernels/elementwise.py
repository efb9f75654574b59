"""Elementwise kernels: `activation(gate) * up` over a range of elements, one kernel per activation."""

from __future__ import annotations

from functools import partial
from typing import Any

from .codegen import Isa, Kernel, for_range, load, store
from .math import ACTIVATIONS, activate


def _gated(isa: Isa, gate: Any, up: Any, y: Any, begin: Any, end: Any, *, activation: str) -> None:
    del isa
    vectors = (end - begin) // 16
    with for_range(0, vectors) as i:
        at = begin + i * 16
        store(y, at, activate(load(gate, at), activation) * load(up, at))
    with for_range(begin + vectors * 16, end) as i:
        store(y, i, activate(load(gate, i, 1), activation) * load(up, i, 1), 1)


KERNELS = [
    Kernel(
        f"gated_{activation}",
        "gate: const f32*, up: const f32*, y: f32*, begin: i64, end: i64",
        partial(_gated, activation=activation),
        "elementwise",
    )
    for activation in ACTIVATIONS
]
