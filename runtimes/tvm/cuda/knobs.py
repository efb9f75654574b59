"""Knobs of the GPU's kernels: fields of their generators whose best values depend on the chip, and are measured.

A kernel (`Gemm`, `Skinny`, ...) is a frozen value; some of its fields are no part of what it computes: tiles, stages,
warps. Their defaults stand in the generators. While plans are made, `tuned(kernel)` gives a kernel the values that hold
in the scope around it (`choosing`); without one it stays as it is. What identifies a kernel for the database is
everything but its knobs (`group_of`), so equal kernels of two models share what was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

import tvm

from ...module_sources import sources_digest

HERE = Path(__file__).resolve().parent

Choose = Callable[[Any], Mapping[str, int]]
"""Kernel → values of its knobs (those it leaves out stay)."""


@dataclass(frozen=True)
class Knob:
    """A field of a generator (`tile.rows`: of its field `tile`) and what it may be, neighbours alike."""

    field: str
    values: tuple[int, ...]
    why: str


KNOBS: dict[str, tuple[Knob, ...]] = {
    "Gemm": (
        Knob("tile.warps_n", (1, 2, 4), "Warps along features."),
        Knob("tile.warps_m", (1, 2, 4), "Warps along tokens."),
        Knob("tile.rows", (1, 2), "32-row pieces of a warp: more share what is read of a token."),
        Knob("tile.columns", (2, 4, 8), "8-token pieces of a warp: more share what is decoded of a weight."),
        Knob(
            "stages",
            (2, 3, 4, 5),
            "Of the ring of copies: more are on their way, fewer blocks fit a processor.",
        ),
    ),
    "Skinny": (
        Knob("warps", (2, 4, 8, 16), "Warps that share the inputs of a tile between them (split K)."),
        Knob("depth", (2, 3, 4, 6), "Chunks of a warp's ring of copies."),
        Knob("active_words", (8, 16, 32, 64), "Registers for activations that are loaded ahead."),
    ),
    "DenseFew": (
        Knob("tokens", (1, 2, 4, 8, 16), "Tokens that share what is read of a weight."),
        Knob("warps", (2, 4, 8, 16), "Warps that share the inputs between them (split K)."),
    ),
    "DenseMany": (
        Knob("tokens", (16, 32, 64, 128), "Tokens of a block."),
        Knob("warps", (4, 8, 16), "Warps that share them."),
    ),
    "FewQueries": (
        Knob("rows", (1, 2, 4, 8), "Queries that share what is read of keys and values."),
        Knob("warps", (2, 4, 8, 16), "Warps of a block: four keys each at a time."),
        Knob("splits", (2, 4, 8, 16, 32), "Ranges of keys, a block each."),
    ),
    "ManyQueries": (
        Knob("keys", (32, 64, 128), "Keys of a tile in shared memory."),
        Knob("warps", (2, 4, 8), "Warps of a block, 16 queries each."),
    ),
    "Rows": (Knob("block", (0, 64, 128, 256, 512, 1024), "Threads for a row; 0: eight elements each."),),
}
"""By the name of the kernel's class."""

_scope: ContextVar[Choose | None] = ContextVar("isofold_cuda_knobs", default=None)


@contextmanager
def choosing(choose: Choose) -> Iterator[None]:
    """Within it, plans are made with the values that `choose` says."""
    token = _scope.set(choose)
    try:
        yield
    finally:
        _scope.reset(token)


def tuned(kernel: Any) -> Any:
    """The kernel with the values that hold here."""
    choose = _scope.get()
    return kernel if choose is None or not knobs_of(kernel) else with_values(kernel, choose(kernel))


def knobs_of(kernel: Any) -> tuple[Knob, ...]:
    """The knobs of a kernel."""
    return KNOBS.get(type(kernel).__name__, ())


def values_of(kernel: Any) -> dict[str, int]:
    """The values that a kernel has."""
    return {k.field: reduce(getattr, k.field.split("."), kernel) for k in knobs_of(kernel)}


def with_values(kernel: Any, values: Mapping[str, int]) -> Any:
    """The kernel with other values of its knobs."""
    for field, value in values.items():
        outer, _, inner = field.partition(".")
        kernel = replace(
            kernel, **{outer: replace(getattr(kernel, outer), **{inner: value}) if inner else value}
        )
    return kernel


def group_of(kernel: Any) -> str:
    """What the database knows a kernel by: all of it but its knobs."""
    plain = repr(with_values(kernel, dict.fromkeys(values_of(kernel), 0)))
    return f"cuda_{type(kernel).__name__.lower()}_{hashlib.sha256(plain.encode()).hexdigest()[:16]}"


def sources_of(kernel: Any) -> str:
    """A hash of what measurements depend on: the generator with what it imports of this folder, and TVM."""
    return _sources(type(kernel).__module__.rpartition(".")[2])


@cache
def _sources(module: str) -> str:
    return sources_digest(HERE, module, [HERE / "device.h"], tvm.__version__.encode())
