"""How fast a sparse linear is beside the dense one of the same values: the constants that `extract_sparsity` decides
by.

Times are of one core. A linear reads its weights from memory while it computes, and the two overlap only in part: the
larger and a share (OVERLAP) of the smaller.

    memory       bytes / BANDWIDTH
    few rows     words * (first + (rows - 1) * more)             a word is 64 inputs of one row of weights
    many rows    for each 64 rows (floats: the last 32 or 16): words * word + values * value * width / 64
    dense        the larger of bytes / bandwidth and words * rows * dense

Measured inside ONNX Runtime and with kernels called directly, AMD EPYC of the Zen 5 generation at 4.2 GHz with
AVX512-VBMI2, 28 November 2026; dense float32 is ONNX Runtime's MatMul. N:M reads four rows at once, 64 bytes of each,
which memory serves badly: that is in its `first` (in the cache it needs 0.25 to 0.45). Processors without
AVX512-VBMI2 need two to four times as long for few rows of codes. Threads share bandwidth and work alike, so ratios
change little with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BANDWIDTH = 45.0
"""Bytes a nanosecond."""

OVERLAP = 0.15
"""Share of the smaller of memory and arithmetic that is not hidden behind the larger."""

MARGIN = 1.1
"""A sparse linear must be predicted to be this much faster: less is within the model's error."""

WORD = 64


@dataclass(frozen=True)
class Dense:
    """Of a dense linear: bytes a nanosecond of one row of activations, nanoseconds for a word and a row of many."""

    bandwidth: float
    word: float


@dataclass(frozen=True)
class Pace:
    """Nanoseconds of a layout: see the module. few: most rows that its kernels for few take; few_value: of a value and
    each of few rows, where the work is on values alone."""

    few: int
    first: float
    more: float
    word: float
    value: float
    few_value: float = 0.0


DENSE = {"float32": Dense(33.0, 0.605), "int8": Dense(49.0, 0.131), "int4": Dense(35.0, 0.150)}
"""By what the weights are."""

DENSE_BYTES = {"float32": 4.0, "int8": 1.0, "int4": 0.5}
"""Of a weight."""

PACES = {
    ("bitmask", "float32"): Pace(4, 1.4, 1.1, 3.0, 1.05),
    ("bitmask", "bfloat16"): Pace(4, 1.65, 0.9, 3.2, 0.98),
    ("bitmask", "int8"): Pace(16, 0.55, 0.2, 1.8, 0.28),
    ("bitmask", "int4"): Pace(2, 0.95, 0.95, 8.6, 0.0),
    ("panels", "int4"): Pace(4, 0.65, 0.09, 0.4, 0.0),
    ("windows", "int8"): Pace(4, 0.19, 0.19, 1.5, 0.30),
    ("1:4", "int8"): Pace(4, 0.52, 0.25, 1.0, 0.30),
    ("2:4", "int8"): Pace(4, 1.0, 0.42, 1.5, 0.30),
    ("4:8", "int8"): Pace(4, 1.2, 0.42, 1.5, 0.30),
    ("1x4", "int8"): Pace(4, 0.56, 0.3, 0.8, 0.30),
    ("16x1", "float32"): Pace(4, 0.0, 0.0, 0.0, 0.68, 0.035),
    ("16x1", "bfloat16"): Pace(4, 0.0, 0.0, 0.0, 0.70, 0.045),
    ("16x4", "int8"): Pace(4, 0.0, 0.0, 0.0, 0.19, 0.009),
}
"""By layout and type of the values."""

WINDOWS_DOUBLE = 0.11
"""Density from which a row often has more than 32 values in a window, so that its work doubles."""


def dense_time(value: str, rows: int, weights: int, size: int) -> float:
    """Nanoseconds of a dense linear of `weights` weights in `size` bytes."""
    dense = DENSE[value]
    return max(size / dense.bandwidth, weights / WORD * rows * dense.word)


def sparse_time(layout: str, value: str, rows: int, weights: int, stored: int, size: int) -> float:
    """Nanoseconds of a sparse linear of `weights` weights of which `stored` are stored, in `size` bytes."""
    pace, words = PACES[layout, value], weights / WORD
    memory = size / BANDWIDTH
    if rows <= pace.few:
        first = pace.first * (2 if layout == "windows" and stored > WINDOWS_DOUBLE * weights else 1)
        arithmetic = words * (first + (rows - 1) * pace.more) + stored * rows * pace.few_value
    elif value == "int4":  # decoded, then dense
        arithmetic = words * (pace.word + rows * DENSE[value].word)
    else:
        blocks, left = divmod(rows, 64)
        width = 64 * blocks
        if left:
            blocks += 1
            width += 64 if value == "int8" or left > 32 else 32 if left > 16 else 16
        arithmetic = blocks * words * pace.word + stored * pace.value * width / 64
    return max(memory, arithmetic) + OVERLAP * min(memory, arithmetic)


def size_of(layout: str, value: str, weights: int, stored: int) -> int:
    """Bytes of the encoding, about: what pads it and the scales, which the dense linear has too, are left out."""
    width = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}[value]
    places = {
        "bitmask": weights / 8, "panels": weights / 8, "windows": stored + weights / 256, "1:4": stored / 4,
        "2:4": stored / 4, "4:8": stored * 3 / 8, "1x4": weights / 32, "16x1": stored / 8, "16x4": stored / 32,
    }[layout]  # fmt: skip
    return int(places + stored * width)


def break_even(layout: str, value: str, rows: int, dense: str) -> float:
    """The largest share of weights stored, in hundredths, at which a layout is predicted to be faster by MARGIN than
    the dense linear of the type `dense`; 0: none."""

    def time(weights: int, stored: int) -> float:
        return sparse_time(layout, value, rows, weights, stored, size_of(layout, value, weights, stored))

    return largest_share(dense, rows, time)


def largest_share(dense: str, rows: int, time: Callable[[int, int], float]) -> float:
    """The same for any prediction: `time(weights, stored)` in nanoseconds."""
    weights = 1 << 24
    whole = dense_time(dense, rows, weights, int(weights * DENSE_BYTES[dense]))
    for percent in range(100, 0, -1):
        if whole / time(weights, weights * percent // 100) >= MARGIN:
            return percent / 100
    return 0.0
