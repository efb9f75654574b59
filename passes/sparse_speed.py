"""How fast a sparse linear is beside the dense one of the same type: the constants that `extract_sparsity` decides by.

Times are of one core, for one word of weights (64 inputs of one output feature). A linear reads its weights from memory
while it computes, and the two overlap only in part: the larger and half of the smaller.

    memory       bytes / BANDWIDTH
    few rows     ceil(rows / 4) * first + (rows - ceil(rows / 4)) * more
    many rows    for each 64 rows (the last float ones: 32 or 16): word + non-zeros of the word * nonzero * width / 64
    dense        max(bytes / BANDWIDTH, rows * dense): its bandwidth was measured with its own arithmetic

Measured with kernels called directly on weights in the cache, AMD EPYC of the Zen 4 generation at 3.7 GHz with
AVX512-VBMI2, 23 November 2026 (in cycles: 13.4 for a word of float32, 9.7 with few non-zeros, 3.8 for one of int8);
dense float32 is ONNX Runtime's MatMul. Processors without AVX512-VBMI2 need two to four times as long for int8 words.
Threads share bandwidth and work alike, so ratios change little with their number.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..compiler.dialect.sparse_packing import WORD

BANDWIDTH = 20.0
"""Bytes a nanosecond."""

MARGIN = 1.1
"""A sparse linear must be predicted to be this much faster: less is within the model's error."""


@dataclass(frozen=True)
class Pace:
    """Nanoseconds for a word: `first` of up to four rows of activations, each `more` of them, with up to `low_density`
    and one row `low`; `word` and `nonzero` for 64 of many rows; `dense` for a row of the dense linear.

    few: most rows that are expanded. value_bytes: of one weight.
    """

    value_bytes: int
    few: int
    first: float
    more: float
    low: float
    low_density: float
    word: float
    nonzero: float
    dense: float


PACES = {
    "float32": Pace(
        4, few=4, first=3.6, more=1.1, low=2.6, low_density=14 / 64, word=7.0, nonzero=2.2, dense=1.4
    ),
    "int8": Pace(1, few=16, first=1.03, more=0.3, low=1.03, low_density=0, word=3.1, nonzero=0.7, dense=0.29),
}
"""By the type of the weights; activations are float32 and uint8."""


def dense_time(kind: str, rows: int) -> float:
    """Nanoseconds for a word of the dense linear."""
    pace = PACES[kind]
    return max(WORD * pace.value_bytes / BANDWIDTH, rows * pace.dense)


def sparse_time(kind: str, rows: int, density: float) -> float:
    """Nanoseconds for a word of the sparse linear."""
    pace = PACES[kind]
    memory = WORD * (1 / 8 + density * pace.value_bytes) / BANDWIDTH
    if rows <= pace.few:
        groups = -(-rows // 4)
        arithmetic = groups * pace.first + (rows - groups) * pace.more
        if rows == 1 and density <= pace.low_density:
            arithmetic = pace.low
    else:
        blocks, left = divmod(rows, 64)
        width = 64 * blocks
        if left:
            blocks += 1
            width += 64 if pace.value_bytes == 1 or left > 32 else 32 if left > 16 else 16
        arithmetic = blocks * pace.word + density * WORD * pace.nonzero * width / 64
    return max(memory, arithmetic) + min(memory, arithmetic) / 2


def speedup(kind: str, rows: int, density: float) -> float:
    """Predicted time of the dense linear over that of the sparse one."""
    return dense_time(kind, rows) / sparse_time(kind, rows, density)


def break_even(kind: str, rows: int) -> float:
    """The largest density, in hundredths, at which the sparse linear is predicted to be faster by MARGIN; 0: none."""
    return next((d / 100 for d in range(100, 0, -1) if speedup(kind, rows, d / 100) >= MARGIN), 0.0)
