"""What all rules of the default schedule share: the shape of tiles, and how loops become threads and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.s_tir import Schedule

from .schedule_nests import SMALL, Axis


@dataclass(frozen=True)
class Shape:
    """What a schedule may depend on, and what is tuned.

    lanes: float32 of a vector register. rows, columns: vectors and lanes of a contraction's tile. chains: vectors of
    partial sums of a row.
    """

    lanes: int = 16
    rows: int = 8
    columns: int = 32
    chains: int = 2

    @staticmethod
    def of(target: Any) -> Shape:
        """The default for an instruction set."""
        wide = "v4" in str(target.attrs.get("mcpu", "")) or any(
            "avx512f" in str(f) for f in target.attrs.get("mattr", ()) or ()
        )
        return Shape() if wide else Shape(lanes=8, rows=6, columns=16)


ENOUGH = 8
"""Iterations that are shared out well."""


def share(sch: Schedule, loops: Sequence[Any], size: int) -> None:
    """Outer loops in parallel, where the nest is large enough.

    Loops are fused only over extents that are known, but for the outermost of them: indices divided by unknown extents
    are more than TVM's region analysis can take, and cost a division.
    """
    wide = [loop for loop in loops if extent_of(sch, loop) != 1]
    if not wide or size <= SMALL:
        return
    run, count = [wide[0]], extent_of(sch, wide[0])
    for loop in wide[1:]:
        extent = extent_of(sch, loop)
        if extent is not None:
            run, count = [*run, loop], None if count is None else count * extent
        elif count is not None and count < ENOUGH:
            run, count = [loop], None
        else:
            break
    sch.parallel(_fused(sch, run, loops))


def _fused(sch: Schedule, run: list[Any], loops: Sequence[Any]) -> Any:
    """The loops of the run as one; those of one iteration that lie between them go with them."""
    first, last = loops.index(run[0]), loops.index(run[-1])
    together = list(loops[first : last + 1])
    return sch.fuse(*together) if len(together) > 1 else together[0]


def vectors(sch: Schedule, axis: Axis, lanes: int) -> tuple[Any | None, Any]:
    """Split an axis for vectors; the outer loop (None: the axis is one vector) and the lanes."""
    if axis.extent is not None and axis.extent <= lanes:
        return None, axis.loop
    outer, inner = sch.split(axis.loop, factors=[None, lanes])
    return outer, inner


def extent_of(sch: Schedule, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if hasattr(extent, "value") else None
