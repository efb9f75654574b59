"""Rules of the default schedule in the order in which they are tried, those for sums along rows, and inlining.

A rule is a class: `apply` schedules a nest (or a whole function) and says why it could; where it does not apply it
returns None and leaves the schedule alone. Threads: outer loops are fused and shared out where the nest has more than
`SMALL` iterations. Vectors: `Shape.lanes` elements; ends are taken apart in `schedule_lower`.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError

from .schedule_contraction import Contraction, Packed, reuses
from .schedule_elementwise import Elementwise, Padding
from .schedule_loops import Shape, extent_of, share
from .schedule_nests import SMALL, Nest, has_call, nests


class RowReduction:
    """Each result from a row of neighbours: rows in parallel; `schedule_sums` makes the sum of a row one of vectors."""

    name = "row reduction"

    def apply(self, sch: Schedule, nest: Nest, shape: Shape) -> str | None:
        if not nest.reduced or not nest.regular or not _along_rows(nest, shape):
            return None
        first = nest.reduced[0].loop
        ordered = [a.loop for a in (*nest.spatial, *nest.reduced)]
        if len(ordered) > 1:
            sch.reorder(*ordered)
        size = nest.size()
        if not nest.spatial and size > SMALL:
            return _parallel_sum(sch, nest)
        share(sch, [a.loop for a in nest.spatial], size)
        sch.decompose_reduction(nest.block, first)
        return "neighbours are summed into lanes"


def _along_rows(nest: Nest, shape: Shape) -> bool:
    last = nest.reduced[-1]
    long = last.extent is None or last.extent >= shape.lanes
    return long and len(nest.stmt.writes) == 1 and 1 in [step for _, step in nest.strides(last)]


PARTS = 64
"""Parts of a sum over everything, which threads share."""


def _parallel_sum(sch: Schedule, nest: Nest) -> str | None:
    """One result from everything: the outermost loop that is long enough is cut into parts with sums of their own."""
    outer = next((a for a in nest.reduced[:-1] if a.extent is None or a.extent >= 8), None)
    if outer is None:
        known = nest.reduced[-1].extent
        if known is None or known % PARTS:
            return None
        above, _ = sch.split(nest.reduced[-1].loop, factors=[PARTS, None])
        partial = sch.rfactor(above, 0)
    else:
        partial = sch.rfactor(outer.loop, 0)
    loops = sch.get_loops(partial)
    sch.parallel(loops[0])
    sch.decompose_reduction(partial, loops[1])
    return "parts are summed by threads, neighbours into lanes"


class Plain:
    """Anything else that has loops: results in parallel."""

    name = "plain"

    def apply(self, sch: Schedule, nest: Nest, shape: Shape) -> str | None:
        del shape
        loops = []
        for axis in nest.axes:
            if axis.reduces:
                break
            loops.append(axis.loop)
        if nest.regular:
            share(sch, loops, nest.size())
        return "no vectors: " + (
            "its sums are short or have several results" if nest.reduced else "irregular loops"
        )


NEST_RULES = (Padding(), Elementwise(), Contraction(), Packed(), RowReduction(), Plain())
"""In the order in which they are tried on each nest."""


class Rows:
    """Several steps over the same rows (softmax, norms): their loops over rows are shared out in the same way, and
    `schedule_join` makes them one, whose data stays in the cache."""

    name = "rows"

    def apply(self, sch: Schedule, shape: Shape) -> str | None:
        found = nests(sch)
        if (
            len(found) < 2
            or not all(n.regular and n.axes for n in found)
            or not any(n.reduced for n in found)
        ):
            return None
        lead = self._same_rows(found)
        if lead == 0:
            return None
        work = max(n.size() for n in found)
        if work > SMALL and found[-1].size(found[-1].axes[:lead]) < 4:
            return None
        if any(n.reduced and (not _along_rows(n, shape) or reuses(n)) for n in found):
            return None
        for n in found:
            if not n.reduced:
                self._rows(sch, n.block, lead, work, shape)
                continue
            if not all(not a.reduces for a in n.axes[:lead]):
                return None
            self._rows(sch, n.block, lead, work, None)
            sch.decompose_reduction(n.block, n.reduced[0].loop)
        return f"{len(found)} steps over the same rows"

    @staticmethod
    def _rows(sch: Schedule, block: Any, lead: int, work: int, shape: Shape | None) -> None:
        """The leading loops of a block fused and shared out; elementwise ones (`shape`) with vectors behind them."""
        loops = sch.get_loops(block)
        if shape is not None and len(loops) > lead:
            lanes, extent = loops[-1], extent_of(sch, loops[-1])
            if extent is None or extent > shape.lanes:
                _, lanes = sch.split(lanes, factors=[None, shape.lanes])
            if extent != 1:
                sch.vectorize(lanes)
        share(sch, loops[:lead], work)

    @staticmethod
    def _same_rows(found: list[Nest]) -> int:
        """How many leading loops all nests have in common."""
        least = min(_leading(n) for n in found)
        extents = [[str(a.size) for a in n.axes[:least]] for n in found]
        return next((d for d in range(least) if len({e[d] for e in extents}) > 1), least)


def _leading(nest: Nest) -> int:
    count = 0
    for axis in nest.axes:
        if axis.reduces:
            break
        count += 1
    return count


HEAVY = ("exp", "tanh", "sigmoid", "erf", "log", "pow", "sin", "cos")


def inline(sch: Schedule) -> None:
    """Inline elementwise steps into what reads them, unless they are expensive and read by a reduction."""
    changed = True
    while changed:
        changed = False
        for nest in nests(sch):
            if nest.reduced or not nest.regular:
                continue
            try:
                readers = [Nest(sch, block) for block in sch.get_consumers(nest.block)]
            except ScheduleError:
                continue
            if not readers:
                continue
            if any(r.reduced for r in readers) and (
                has_call(nest.stmt, (*HEAVY, "if_then_else")) or len(readers) > 1
            ):
                continue
            if len(readers) > 1 and has_call(nest.stmt, HEAVY):
                continue
            try:
                sch.compute_inline(nest.block)
            except ScheduleError:
                continue
            changed = True
            break
