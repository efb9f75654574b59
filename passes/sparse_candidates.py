"""In which layouts a matrix with zeros can be stored, and what each is predicted to cost.

Every layout of `compiler/dialect/sparse_packing` that holds the matrix as it is is a candidate: blocks are filled up
with the zeros in them, N:M only where the pattern is there, bfloat16 only where every value is one already. So all
candidates are the same matrix, and the choice is one of time. Two layouts that share a matrix: `sparse_mixtures`.
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
from .sparse_speed import size_of, sparse_time
from .sparsity_patterns import count_blocks


@dataclass(frozen=True)
class Rest:
    """Of a mixture: the layout of what is not in blocks, how many values that is, the share of non-zeros from which a
    block was whole (0: of N:M), and the nanoseconds for the result that goes from one operator to the other."""

    layout: str
    stored: int
    share: float
    passes_nanoseconds: float


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix. stored: values, with the zeros of blocks that are not full; nanoseconds of one run;
    rest: of a mixture, what `layout` leaves out."""

    layout: str
    value: str
    stored: int
    size: int
    nanoseconds: float
    rest: Rest | None = None

    @property
    def name(self) -> str:
        """The layout in words."""
        return self.layout if self.rest is None else f"{self.layout} + {self.rest.layout}"


def candidates(matrix: Tensor, value: str, rows: int, layout: str = "auto") -> list[Candidate]:
    """All ways, fastest first. value: float32, int8 or int4; layout: only this one."""
    found = []
    values = (value, "bfloat16") if value == "float32" and is_bfloat16(matrix) else (value,)
    asked = [n for n in HELD if layout in ("auto", n) and any(held in HELD[n] for held in values)]
    for name, stored in _stored(matrix, asked):
        for held in values:
            if held in HELD[name]:
                size = size_of(name, held, matrix.numel(), stored)
                time = sparse_time(name, held, rows, matrix.numel(), stored, size)
                found.append(Candidate(name, held, stored, size, time))
    return sorted(found, key=lambda candidate: candidate.nanoseconds)


def _stored(matrix: Tensor, asked: list[str]) -> Iterator[tuple[str, int]]:
    """Which of these layouts hold the matrix, and how many values they store."""
    there = matrix != 0
    total = int(there.sum())
    for layout in asked:
        if layout in GROUPS:
            some, of, _ = GROUPS[layout]
            if int(count_blocks(there, 1, of).amax()) <= some:
                yield layout, matrix.numel() * some // of
        elif layout in BLOCKS:
            height, width = BLOCKS[layout]
            if height == 1 or matrix.shape[1] <= width << 16:
                yield layout, int((count_blocks(there, height, width) > 0).sum()) * height * width
        elif layout != "windows" or int(count_blocks(there, 1, WINDOW).amax()) <= MOST:
            yield layout, total


def is_bfloat16(matrix: Tensor) -> bool:
    """Whether every value is a bfloat16 already."""
    return bool(torch.equal(matrix.bfloat16().float(), matrix))
