"""A matrix as blocks and the few values beside them, each stored in its own layout: `W = B + R`.

    x W^T = x B^T + x R^T              every non-zero of W is in exactly one of the two, so nothing is rounded

B has a layout that stores blocks whole or N of every M inputs, R one that stores single values (`sparse_layouts`).

    16x1, 16x4, 1x4    B: the blocks with at least a share of non-zeros;         R: what stands in the others
    1:4, 2:4, 4:8      B: the first N non-zeros of every M inputs of a row;      R: the rest of groups with more

Two operators read the activations and one of them the other's result, so a mixture pays where most non-zeros are in
blocks and the rest is little work: BITWISE in what is stored, one more sum over the reals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.dialect.sparse_blocks import BLOCKS
from ..compiler.dialect.sparse_groups import GROUPS
from ..compiler.dialect.sparse_layouts import HELD
from ..compiler.dialect.sparse_windows import MOST, WINDOW
from .sparse_candidates import Candidate, Rest, candidates, is_bfloat16
from .sparse_rates import Rates, current
from .sparse_speed import DENSE_BYTES, break_even, largest_share, size_of, sparse_time
from .sparsity_patterns import count_blocks

MIXTURE = "mixture"
"""The recipe's name for all of them."""

SHARES = (0.3, 0.5, 0.75)
"""Shares of non-zeros from which a block may be worth storing whole; the fastest of them is taken."""

OPERATOR = 2000.0
"""Nanoseconds of one more operator."""

_RESTS = ("bitmask", "windows")


@dataclass(frozen=True)
class _Way:
    """One partition, and how many values its two parts store."""

    layout: str
    share: float
    blocks: int
    rest: int


def ways_to_store(
    matrix: Tensor, value: str, rows: int, layout: str = "auto", more_passes: int = 0
) -> list[Candidate]:
    """All ways to store a matrix, in one layout or as a mixture, fastest first.

    layout: `auto`, one of the layouts, or `mixture`. more_passes: how often a mixture's result is read and written once
    more than that of one operator (an activation that no epilogue takes); -1: there can be no mixture.
    """
    found = [] if layout == MIXTURE else candidates(matrix, value, rows, layout)
    if layout in ("auto", MIXTURE) and more_passes >= 0:
        mixed = fastest_mixture(matrix, value, rows, more_passes)
        found += [] if mixed is None else [mixed]
    return sorted(found, key=lambda candidate: candidate.nanoseconds)


def fastest_mixture(matrix: Tensor, value: str, rows: int, more_passes: int = 0) -> Candidate | None:
    """The mixture that is predicted to be the fastest; None where no layout takes a part of the matrix only."""
    there = matrix != 0
    values = (value, "bfloat16") if value == "float32" and is_bfloat16(matrix) else (value,)
    found = [
        _candidate(matrix, way, held, rest, rows, more_passes)
        for layout in (*BLOCKS, *GROUPS)
        if set(values) & set(HELD[layout])
        for way in _ways(there, layout)
        for held in values
        for rest in _RESTS
        if held in HELD[layout] and held in HELD[rest]
    ]
    found.sort(key=lambda candidate: candidate.nanoseconds)
    return next((candidate for candidate in found if _holds(there, candidate)), None)


def split(matrix: Tensor, candidate: Candidate) -> tuple[Tensor, Tensor]:
    """B and R of a mixture: B + R is the matrix, and no place is non-zero in both."""
    assert candidate.rest is not None
    there = _in_blocks(matrix != 0, candidate.layout, candidate.rest.share)
    return matrix * there, matrix * ~there


def break_even_of(candidate: Candidate, weights: int, rows: int, dense: str) -> float:
    """The largest share of weights stored up to which a way pays; of a mixture, with as many of them beside blocks."""
    rest = candidate.rest
    if rest is None:
        return break_even(candidate.layout, candidate.value, rows, dense)
    beside, more, rates = rest.stored / candidate.stored, rest.passes_nanoseconds / weights, current()

    def time(weights: int, stored: int) -> float:
        single = int(stored * beside)
        parts = ((candidate.layout, stored - single), (rest.layout, single))
        return (
            OPERATOR
            + more * weights
            + sum(_time(*part, candidate.value, rows, weights, rates) for part in parts)
        )

    return largest_share(dense, rows, time, rates)


def _ways(there: Tensor, layout: str) -> Iterator[_Way]:
    """Partitions for a layout of B that leave something for both."""
    height, width = (1, GROUPS[layout][1]) if layout in GROUPS else BLOCKS[layout]
    if height > 1 and there.shape[1] > width << 16:
        return
    # How many blocks have 0, 1, ... non-zeros.
    blocks = torch.bincount(count_blocks(there, height, width).flatten())
    count = torch.arange(len(blocks))
    total = int((count * blocks).sum())
    if layout in GROUPS:
        some = GROUPS[layout][0]
        rest = int(((count - some).clamp(min=0) * blocks).sum())
        if 0 < rest < total:
            yield _Way(layout, 0.0, there.numel() * some // width, rest)
        return
    for share in SHARES:
        whole = count >= share * height * width
        rest = int((count * blocks)[~whole].sum())
        if 0 < rest < total:
            yield _Way(layout, share, int(blocks[whole].sum()) * height * width, rest)


def _in_blocks(there: Tensor, layout: str, share: float) -> Tensor:
    """Which places are B's, bool of the matrix's shape."""
    n, k = there.shape
    if layout in GROUPS:
        some, of, _ = GROUPS[layout]
        groups = torch.nn.functional.pad(there, (0, -k % of)).unflatten(1, (-1, of))
        first = groups & (groups.cumsum(-1, dtype=torch.int8) <= some)
        return first.flatten(1)[:, :k]
    height, width = BLOCKS[layout]
    whole = count_blocks(there, height, width) >= share * height * width
    return whole.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k]


def _holds(there: Tensor, candidate: Candidate) -> bool:
    """Whether R fits its layout: windows count to 255."""
    if candidate.rest is None or candidate.rest.layout != "windows":
        return True
    left = there & ~_in_blocks(there, candidate.layout, candidate.rest.share)
    return int(count_blocks(left, 1, WINDOW).amax()) <= MOST


def _candidate(matrix: Tensor, way: _Way, value: str, rest: str, rows: int, more_passes: int) -> Candidate:
    weights, parts = matrix.numel(), ((way.layout, way.blocks), (rest, way.rest))
    rates = current()
    passes = (1 + more_passes) * 2 * DENSE_BYTES["float32"] * rows * len(matrix) / rates.bandwidth
    return Candidate(
        way.layout,
        value,
        way.blocks + way.rest,
        sum(size_of(layout, value, weights, stored) for layout, stored in parts),
        OPERATOR + passes + sum(_time(*part, value, rows, weights, rates) for part in parts),
        Rest(rest, way.rest, way.share, passes),
    )


def _time(layout: str, stored: int, value: str, rows: int, weights: int, rates: Rates) -> float:
    size = size_of(layout, value, weights, stored)
    return sparse_time(layout, value, rows, weights, stored, size, rates)
