"""The rates that predictions about sparse linears are made of: this machine's own where `isofold machine` has measured
them, else those of a machine of its kind.

Times are of one core, or of all threads together where they were measured: `extract_sparsity` compares them with each
other only. The constants were measured inside ONNX Runtime and with kernels called directly, AMD EPYC of the Zen 5
generation at 4.2 GHz, 28 November 2026, with AVX512-VBMI2 (WIDE) and with the kernels for x86-64-v3 (NARROW); dense
float32 is ONNX Runtime's MatMul. N:M reads four rows at once, 64 bytes of each, which memory serves badly: that is in
its `first` (in the cache it needs 0.25 to 0.45).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ..compiler.cost_model import FLOAT_LINEAR, Machine
from ..compiler.dialect.sparse_blocks import BLOCKS
from ..compiler.machine import known_machine, measured_at
from ..compiler.processor import expands_bytes

WORD = 64
MANY = 128
"""Rows at which many rows are measured; kernels take them 64 at a time."""


@dataclass(frozen=True)
class Dense:
    """Of a dense linear: bytes a nanosecond of one row of activations, nanoseconds for a word and a row of many."""

    bandwidth: float
    word: float


@dataclass(frozen=True)
class Pace:
    """Nanoseconds of a layout (`sparse_speed` has the formula). few: most rows that its kernels for few take;
    few_value: of a value and each of few rows, where the work is on values alone."""

    few: int
    first: float
    more: float
    word: float
    value: float
    few_value: float = 0.0


@dataclass(frozen=True)
class Rates:
    """bandwidth: bytes a nanosecond. dense: by type of the weights. paces: by layout and type of the values."""

    bandwidth: float
    dense: Mapping[str, Dense]
    paces: Mapping[tuple[str, str], Pace]


WIDE = Rates(
    45.0,
    {"float32": Dense(33.0, 0.605), "int8": Dense(45.0, 0.131), "int4": Dense(37.0, 0.150)},
    {
        ("bitmask", "float32"): Pace(4, 1.4, 1.1, 3.0, 1.05),
        ("bitmask", "bfloat16"): Pace(4, 1.65, 0.9, 3.2, 0.98),
        ("bitmask", "int8"): Pace(16, 0.55, 0.2, 1.8, 0.28),
        ("bitmask", "int4"): Pace(2, 0.95, 0.95, 3.5, 0.0),
        ("panels", "int4"): Pace(4, 0.62, 0.09, 0.4, 0.0),
        ("windows", "int8"): Pace(4, 0.19, 0.19, 1.5, 0.30),
        ("1:4", "int8"): Pace(4, 0.52, 0.25, 1.0, 0.30),
        ("2:4", "int8"): Pace(4, 1.0, 0.42, 1.5, 0.30),
        ("4:8", "int8"): Pace(4, 1.2, 0.42, 1.5, 0.30),
        ("1x4", "int8"): Pace(4, 0.56, 0.3, 0.8, 0.30),
        ("16x1", "float32"): Pace(4, 0.0, 0.0, 0.0, 0.68, 0.035),
        ("16x1", "bfloat16"): Pace(4, 0.0, 0.0, 0.0, 0.70, 0.045),
        ("16x4", "int8"): Pace(4, 0.0, 0.0, 0.0, 0.19, 0.009),
    },
)
"""Processors with AVX512-VBMI2."""

NARROW = Rates(
    45.0,
    {"float32": Dense(33.0, 1.21), "int8": Dense(26.7, 0.742), "int4": Dense(17.5, 0.402)},
    {
        ("bitmask", "float32"): Pace(4, 3.9, 1.9, 6.0, 2.5),
        ("bitmask", "bfloat16"): Pace(4, 4.1, 1.9, 6.0, 2.1),
        ("bitmask", "int8"): Pace(16, 3.1, 0.85, 7.1, 1.52),
        ("bitmask", "int4"): Pace(2, 10.9, 0.4, 12.1, 0.0),
        ("panels", "int4"): Pace(4, 8.3, 0.4, 6.8, 0.0),
        ("windows", "int8"): Pace(4, 2.66, 2.06, 5.4, 1.2),
        ("1:4", "int8"): Pace(4, 6.7, 4.6, 23.5, 0.0),
        ("2:4", "int8"): Pace(4, 12.8, 9.5, 43.9, 0.0),
        ("4:8", "int8"): Pace(4, 13.6, 9.3, 45.2, 0.0),
        ("1x4", "int8"): Pace(4, 1.86, 1.5, 4.9, 0.96),
        ("16x1", "float32"): Pace(4, 0.0, 0.0, 0.0, 1.8, 0.055),
        ("16x1", "bfloat16"): Pace(4, 0.0, 0.0, 0.0, 1.9, 0.037),
        ("16x4", "int8"): Pace(4, 0.0, 0.0, 0.0, 1.0, 0.022),
    },
)
"""Others, with the kernels for x86-64-v3: the same processor, ISOFOLD_ISA=v3."""


def current() -> Rates:
    """Of this machine, as far as it is known."""
    return _current(measured_at(), expands_bytes())


@lru_cache(maxsize=8)
def _current(measured: int, wide: bool) -> Rates:
    fallback = WIDE if wide else NARROW
    machine, own = known_machine() if measured else (None, False)
    return fitted(machine, fallback) if machine is not None and own else fallback


def fitted(machine: Machine, fallback: Rates) -> Rates:
    """The rates that explain what was measured; what was not measured is the fallback's."""
    read = machine.bandwidth[-1][1] * 1e-9
    dense = {**fallback.dense}
    kinds = {
        "float32": (FLOAT_LINEAR, 256.0, 256.0),
        "int8": ("linear_packed 8 bits", 64.0, 64.0),
        "int4": ("linear_packed 4 bits in groups", 32.0, 36.0),
    }
    # Bytes of a word's codes, and with the scales of groups of 32, which are read too and not counted (`sparse_speed`).
    for name, (kind, size, whole) in kinds.items():
        points = {int(rows): pace for rows, pace in machine.paces.get(kind, ())}
        if {1, MANY} <= set(points):
            cached = size / (WORD * 1e9 * points[1])
            dense[name] = Dense(min(read * size / whole, cached), WORD * 1e9 * points[MANY] / MANY)
    paces = {**fallback.paces}
    for (layout, value), pace in fallback.paces.items():
        if points_of := machine.sparse.get(f"{layout} {value}"):
            paces[layout, value] = _fit(layout, value, pace, points_of, dense.get(value))
    return Rates(read, dense, paces)


def _fit(
    layout: str, value: str, pace: Pace, points: list[tuple[float, float, float]], dense: Dense | None
) -> Pace:
    """A layout's pace from (rows, share stored, seconds a weight)."""
    word = {(int(rows), share): WORD * 1e9 * seconds for rows, share, seconds in points}
    shares = sorted({share for _, share in word}, reverse=True)
    full = shares[0]
    few = max(rows for rows, _ in word if rows <= pace.few)
    if layout in BLOCKS and layout != "1x4":
        made = replace(pace, few_value=word[1, full] / (WORD * full))
    else:
        more = (word[few, full] - word[1, full]) / max(few - 1, 1)
        made = replace(pace, first=word[1, full], more=max(more, 0.0) if few > 1 else pace.more)
    if value == "int4":
        assert dense is not None
        return replace(made, word=max(word[MANY, full] - MANY * dense.word, 0.0))
    blocks = MANY / 64
    if len(shares) == 1:
        return replace(made, word=word[MANY, full] / blocks, value=0.0)
    slope = (word[MANY, full] - word[MANY, shares[-1]]) / (WORD * (full - shares[-1]) * blocks)
    slope = max(slope, 0.0)
    return replace(made, word=max(word[MANY, full] / blocks - WORD * full * slope, 0.0), value=slope)
