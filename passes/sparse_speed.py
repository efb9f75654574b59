"""How fast a sparse linear is beside the dense one of the same values: what `extract_sparsity` decides by.

Times are of one core. A linear reads its weights from memory while it computes, and the two overlap only in part: the
larger and a share (OVERLAP) of the smaller.

    memory       bytes / BANDWIDTH
    few rows     words * (first + (rows - 1) * more)             a word is 64 inputs of one row of weights
    many rows    for each 64 rows (floats: the last 32 or 16): words * word + values * value * width / 64
    dense        the larger of bytes / bandwidth and words * rows * dense

The rates are this machine's where `isofold machine` has measured them (`sparse_rates`). Threads share bandwidth and
work alike, so ratios change little with their number.
"""

from __future__ import annotations

from collections.abc import Callable

from .sparse_rates import WORD, Rates, current

OVERLAP = 0.15
"""Share of the smaller of memory and arithmetic that is not hidden behind the larger."""

MARGIN = 1.1
"""A sparse linear must be predicted to be this much faster: less is within the model's error."""

DENSE_BYTES = {"float32": 4.0, "int8": 1.0, "int4": 0.5}
"""Of a weight."""

WINDOWS_DOUBLE = 0.11
"""Density from which a row often has more than 32 values in a window, so that its work doubles."""


def dense_time(value: str, rows: int, weights: int, size: int, rates: Rates | None = None) -> float:
    """Nanoseconds of a dense linear of `weights` weights in `size` bytes."""
    dense = (rates or current()).dense[value]
    return max(size / dense.bandwidth, weights / WORD * rows * dense.word)


def sparse_time(
    layout: str, value: str, rows: int, weights: int, stored: int, size: int, rates: Rates | None = None
) -> float:
    """Nanoseconds of a sparse linear of `weights` weights of which `stored` are stored, in `size` bytes."""
    rates = rates or current()
    pace, words = rates.paces[layout, value], weights / WORD
    memory = size / rates.bandwidth
    if rows <= pace.few:
        first = pace.first * (2 if layout == "windows" and stored > WINDOWS_DOUBLE * weights else 1)
        arithmetic = words * (first + (rows - 1) * pace.more) + stored * rows * pace.few_value
    elif value == "int4":  # decoded, then dense
        arithmetic = words * (pace.word + rows * rates.dense[value].word)
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
    rates = current()

    def time(weights: int, stored: int) -> float:
        size = size_of(layout, value, weights, stored)
        return sparse_time(layout, value, rows, weights, stored, size, rates)

    return largest_share(dense, rows, time, rates)


def largest_share(dense: str, rows: int, time: Callable[[int, int], float], rates: Rates) -> float:
    """The same for any prediction by these rates: `time(weights, stored)` in nanoseconds."""
    weights = 1 << 24
    whole = dense_time(dense, rows, weights, int(weights * DENSE_BYTES[dense]), rates)
    for percent in range(100, 0, -1):
        if whole / time(weights, weights * percent // 100) >= MARGIN:
            return percent / 100
    return 0.0
