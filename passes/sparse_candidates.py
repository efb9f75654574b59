"""In which layouts a matrix with zeros can be stored, and what each is predicted to cost.

Every layout of `compiler/dialect/sparse_packing` that holds the matrix as it is is a candidate: blocks are filled up
with the zeros in them, N:M only where the pattern is there, bfloat16 only where every value is one already. So all
candidates are the same matrix, and the choice is one of time.
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

FULL_ENOUGH = 0.5
"""Share of non-zeros from which a block is worth storing whole beside a bitmask of the rest."""

OPERATOR = 2000.0
"""Nanoseconds of one more operator, for mixtures."""


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix. stored: values, with the zeros of blocks that are not full; nanoseconds of one run."""

    layout: str
    value: str
    stored: int
    size: int
    nanoseconds: float


def candidates(matrix: Tensor, value: str, rows: int, layout: str = "auto") -> list[Candidate]:
    """All ways, fastest first. value: float32, int8 or int4; layout: only this one."""
    found = []
    values = (value, "bfloat16") if value == "float32" and _is_bfloat16(matrix) else (value,)
    for name, stored in _stored(matrix):
        for held in values if layout in ("auto", name) else ():
            if held in HELD[name]:
                size = size_of(name, held, matrix.numel(), stored)
                time = sparse_time(name, held, rows, matrix.numel(), stored, size)
                found.append(Candidate(name, held, stored, size, time))
    return sorted(found, key=lambda candidate: candidate.nanoseconds)


def mixture(matrix: Tensor, value: str, rows: int) -> tuple[str, float] | None:
    """Blocks of 16 rows that are full enough, and a bitmask of the rest, as two operators: its name and nanoseconds.

    It is only predicted, never built (see `extract_sparsity`). None where no block is full enough, or all are.
    """
    layout = {"float32": "16x1", "int8": "16x4"}.get(value)
    if layout is None:
        return None
    height, width = BLOCKS[layout]
    counts = count_blocks(matrix != 0, height, width)
    whole = counts >= FULL_ENOUGH * height * width
    blocks, rest = int(whole.sum()) * height * width, int(counts[~whole].sum())
    if not blocks or not rest:
        return None
    time = OPERATOR
    for part, stored in ((layout, blocks), ("bitmask", rest)):
        size = size_of(part, value, matrix.numel(), stored)
        time += sparse_time(part, value, rows, matrix.numel(), stored, size)
    return f"{layout} and a bitmask", time


def _stored(matrix: Tensor) -> Iterator[tuple[str, int]]:
    """Layouts that hold the matrix, and how many values they store."""
    there = matrix != 0
    total = int(there.sum())
    yield "bitmask", total
    yield "panels", total
    if int(count_blocks(there, 1, WINDOW).amax()) <= MOST:
        yield "windows", total
    for layout, (some, of, _) in GROUPS.items():
        if int(count_blocks(there, 1, of).amax()) <= some:
            yield layout, matrix.numel() * some // of
    for layout, (height, width) in BLOCKS.items():
        if height == 1 or matrix.shape[1] <= width << 16:
            yield layout, int((count_blocks(there, height, width) > 0).sum()) * height * width


def _is_bfloat16(matrix: Tensor) -> bool:
    return bool(torch.equal(matrix.bfloat16().float(), matrix))
