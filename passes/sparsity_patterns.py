"""What pattern the zeros of a matrix make: the name that reports give it.

A pattern is named when it explains the zeros: N:M when no group of M inputs has more than N non-zeros, blocks when
nearly all entries of the blocks that are not empty are non-zero. Whole rows and columns of zeros are counted beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPS = ((1, 4), (2, 4), (4, 8))
"""N:M patterns that are looked for, sparsest first."""

FILLED = 0.75
"""Share of the places of an N:M pattern from which it is named: scattered non-zeros fit it too when they are few."""

BLOCKS = ((16, 16), (16, 1), (1, 16), (4, 4), (1, 4))
"""Rows and columns of blocks that are looked for, largest first."""

FULL = 0.98
"""Share of non-zeros from which a block counts as full, on average."""


@dataclass(frozen=True)
class Pattern:
    """name: `dense`, `2:4`, `blocks of 4x4`, `unstructured`, ...; rows and columns: how many hold nothing."""

    name: str
    density: float
    empty_rows: int
    empty_columns: int


def pattern_of(matrix: Tensor) -> Pattern:
    """The pattern of a matrix `[N, K]`; any dtype."""
    there = matrix != 0
    density = float(there.float().mean()) if there.numel() else 0.0
    rows, columns = (int((~there.any(dim)).sum()) for dim in (1, 0))
    return Pattern(_name(there, density), density, rows, columns)


def _name(there: Tensor, density: float) -> str:
    if density > 0.99:
        return "dense"
    if density == 0:
        return "empty"
    for n, m in GROUPS:
        if density > FILLED * n / m and int(count_blocks(there, 1, m).amax()) <= n:
            return f"{n}:{m}"
    live = there[there.any(1)][:, there.any(0)]
    if float(live.float().mean()) >= FULL:
        return "rows and columns"
    for height, width in BLOCKS:
        counts = count_blocks(there, height, width)
        filled = counts[counts > 0]
        if float(filled.float().mean()) >= FULL * height * width:
            return f"blocks of {height}x{width}"
    return "unstructured"


def count_blocks(there: Tensor, height: int, width: int) -> Tensor:
    """Non-zeros of each block, int32; what sticks out at the end counts as zeros."""
    n, k = there.shape
    padded = F.pad(there, (0, -k % width, 0, -n % height))
    return padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).sum((1, 3), dtype=torch.int32)
