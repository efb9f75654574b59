"""Rules of the default schedule, one class each: `apply` schedules a nest (or a whole function) and says why it could.

A rule that does not apply returns None and leaves the schedule alone. Threads: outer loops are fused and shared out
where the nest has more than `SMALL` iterations. Vectors: `Shape.lanes` elements; ends are taken apart in
`schedule_lower`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError

from .schedule_nests import SMALL, Axis, Nest, buffer_of, has_call, is_multiple, loads, nests, stores


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
    wide = [loop for loop in loops if _extent(sch, loop) != 1]
    if not wide or size <= SMALL:
        return
    run, count = [wide[0]], _extent(sch, wide[0])
    for loop in wide[1:]:
        extent = _extent(sch, loop)
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


class Elementwise:
    """Every result element on its own: the last dimension in vectors, the ones before it in parallel."""

    name = "elementwise"

    def apply(self, sch: Schedule, nest: Nest, shape: Shape) -> str | None:
        if nest.reduced or not nest.regular:
            return None
        if not nest.axes:
            return "a scalar"
        axes = nest.axes
        size = nest.size()
        if self._is_flat(nest):
            fused = sch.fuse(*[a.loop for a in axes]) if len(axes) > 1 else axes[0].loop
            known = nest.size() if all(a.extent is not None for a in axes) else None
            if known is not None and known <= shape.lanes:
                if known > 1:
                    sch.vectorize(fused)
                return "one vector"
            chunk = shape.lanes * (64 if size > SMALL else 1)
            outer, rest = sch.split(fused, factors=[None, chunk])
            if chunk > shape.lanes:
                _, lanes = sch.split(rest, factors=[None, shape.lanes])
            else:
                lanes = rest
            if size > SMALL:
                sch.parallel(outer)
            sch.vectorize(lanes)
            return "all operands have the result's shape"
        *before, last = self._inner_last(sch, nest)
        if last.extent == 1:
            share(sch, [a.loop for a in before], size)
            return "one element a row"
        outer, lanes = vectors(sch, last, shape.lanes)
        loops = [a.loop for a in before]
        rows = nest.size(before)
        if outer is not None and (not before or rows < 8):
            loops.append(outer)
        share(sch, loops, size)
        if not before and outer is None and size > SMALL:
            return None
        sch.vectorize(lanes)
        return f"results of the last dimension lie next to each other ({last.extent or 'any number'})"

    @staticmethod
    def _inner_last(sch: Schedule, nest: Nest) -> list[Axis]:
        """The axes with the one along which results lie next to each other behind the others."""
        axes = nest.axes
        inner = next((a for a in reversed(axes) if nest.written_stride(a) == 1 and a.extent != 1), axes[-1])
        ordered = [a for a in axes if a is not inner] + [inner]
        if ordered != axes:
            sch.reorder(*[a.loop for a in ordered])
        return ordered

    @staticmethod
    def _is_flat(nest: Nest) -> bool:
        """All accesses are at the block's own indices, so that the nest is one loop over memory."""
        own = [a.var for a in nest.axes]
        if any(a.extent is None for a in nest.axes[1:]):
            return False
        for access in (*loads(nest.stmt), *stores(nest.stmt)):
            if len(access.indices) != len(own):
                return False
            for index, var, axis, size in zip(
                access.indices, own, nest.axes, buffer_of(access).shape, strict=True
            ):
                if not var.same_as(index):
                    return False
                extent = axis.extent
                if extent is not None and str(size) != str(extent) and not str(size).endswith(f"({extent})"):
                    return False
        return True


class Padding:
    """A copy with a border: the border is filled first, then the inside is a copy without conditions."""

    name = "padding"

    def apply(self, sch: Schedule, nest: Nest, shape: Shape) -> str | None:
        if nest.reduced or not nest.regular or not nest.axes or not has_call(nest.stmt, ("if_then_else",)):
            return None
        fill = sch.decompose_padding(nest.block, nest.axes[0].loop)
        for block in (fill, nest.block):
            if Elementwise().apply(sch, Nest(sch, block), shape) is None:
                return None
        return "the border filled first"


class Contraction:
    """Sums in which neighbouring results read neighbouring elements: tiles of results stay in registers.

    Matrix products (rows x lanes), convolutions (channels x width), sums over outer dimensions, pooling (lanes only).
    """

    name = "contraction"

    def apply(self, sch: Schedule, nest: Nest, shape: Shape) -> str | None:
        if not nest.reduced or not nest.regular or not nest.spatial:
            return None
        lane = self._lane(nest)
        if lane is None:
            return None
        if self._needs_packing(nest, lane):
            return None
        rows = self._rows(nest, lane)
        size = nest.size()
        loops = {id(a): [a.loop] for a in nest.spatial}
        columns = self._columns(lane, shape, rows is not None)
        outer, lanes = vectors(sch, lane, columns)
        tiles: list[Any] = []
        loops[id(lane)] = [] if outer is None else [outer]
        inner = [lanes]
        if rows is not None:
            count = shape.rows if rows.extent is None else min(shape.rows, rows.extent)
            if rows.extent is not None and rows.extent <= count:
                loops[id(rows)] = []
                tile = rows.loop
            else:
                above, tile = sch.split(rows.loop, factors=[None, count])
                loops[id(rows)] = [above]
            inner = [tile, lanes]
            tiles.append(tile)
        others = [one for a in nest.spatial if a is not lane and a is not rows for one in loops[id(a)]]
        above = loops[id(rows)] if rows is not None else []
        before = [*others, *loops[id(lane)], *above]
        if (
            lane.extent is None and above
        ):  # rows of unknown length may be short: then weights are read again for each
            before = [*others[:1], *above, *others[1:], *loops[id(lane)]]
        sums = [a.loop for a in nest.reduced]
        sch.reorder(*before, *sums, *inner)
        sch.vectorize(lanes)
        for tile in tiles:
            sch.unroll(tile)
        if not before:
            before = [sch.add_unit_loop(sch.get_loops(nest.block)[0])]
        share(sch, before, size)
        if sums:
            start = sch.decompose_reduction(nest.block, sums[0])
            self._like(sch, start, len(tiles))
        what = f"{columns if outer is not None else lane.extent} neighbouring results"
        return f"{what}, {shape.rows} rows of them at once" if rows is not None else what

    @staticmethod
    def _like(sch: Schedule, start: Any, tiles: int) -> None:
        """The loops of the initial values like those of the sums."""
        loops = sch.get_loops(start)
        sch.vectorize(loops[-1])
        for loop in loops[len(loops) - 1 - tiles : -1]:
            sch.unroll(loop)

    @staticmethod
    def _lane(nest: Nest) -> Axis | None:
        for axis in reversed(nest.spatial):
            if nest.written_stride(axis) == 1 and axis.extent != 1:
                return axis
        return None

    @staticmethod
    def _needs_packing(nest: Nest, lane: Axis) -> bool:
        """Whether an operand lies the other way round, so that its neighbours belong to one sum."""
        last = nest.reduced[-1]
        for access, step in nest.strides(lane):
            along = _stride_of(nest, access, last)
            if step not in (0, 1) and along == 1 and (last.extent is None or last.extent >= 8):
                return True
        return False

    @staticmethod
    def _rows(nest: Nest, lane: Axis) -> Axis | None:
        """An axis along which the operand with neighbours is read again."""
        moving = [access for access, step in nest.strides(lane) if step != 0]
        for axis in reversed(nest.spatial):
            if axis is lane or axis.extent == 1:
                continue
            if moving and all(_stride_of(nest, access, axis) == 0 for access in moving):
                return axis
        return None

    @staticmethod
    def _columns(lane: Axis, shape: Shape, tiled: bool) -> int:
        width = shape.columns
        if lane.extent is not None:
            return max(shape.lanes, 1) if lane.extent < width else width
        whole = [w for w in (width, shape.lanes) if is_multiple(lane.size, w)]
        return whole[0] if whole else width


def _stride_of(nest: Nest, access: Any, axis: Axis) -> int | None:
    return next(step for known, step in nest.strides(axis) if known.same_as(access))


class Packed:
    """A contraction whose right side lies the other way round: it is turned once, then as `Contraction`."""

    name = "packed contraction"

    def apply(self, sch: Schedule, nest: Nest, shape: Shape) -> str | None:
        if not nest.reduced or not nest.regular or not nest.spatial:
            return None
        lane = Contraction._lane(nest)
        if lane is None or not Contraction._needs_packing(nest, lane):
            return None
        rows = [a for a in nest.spatial if a is not lane and a.extent != 1]
        last = nest.reduced[-1]
        turned = [
            access
            for access, step in nest.strides(lane)
            if step not in (0, 1) and _stride_of(nest, access, last) == 1
        ]
        if len(turned) != 1:
            return None
        access = turned[0]
        # Turning costs as much as a few rows of sums; and it must be read again.
        again = [a for a in rows if _stride_of(nest, access, a) == 0]
        if not again or nest.size(again) < 4:
            return None
        place = {str(v): d for d, v in enumerate(access.indices)}
        if str(lane.var) not in place or place.get(str(last.var)) != len(access.indices) - 1:
            return None
        at = next(
            i for i, read in enumerate(sch.get(nest.block).reads) if read.source.same_as(buffer_of(access))
        )
        rank, swapped = len(access.indices), place[str(lane.var)]
        copy = sch.cache_read(nest.block, at, "global")

        def turn(*i: Any) -> list[Any]:
            order = [*i]
            order[swapped], order[-1] = order[-1], order[swapped]
            return order

        del rank
        sch.transform_layout(nest.block, ("read", at), turn)
        Elementwise().apply(sch, Nest(sch, copy), shape)
        why = Contraction().apply(sch, Nest(sch, nest.block), shape)
        return None if why is None else f"one side turned first, then {why}"


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
        if any(n.reduced and (not _along_rows(n, shape) or _reuses(n)) for n in found):
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
            lanes, extent = loops[-1], _extent(sch, loops[-1])
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


def _reuses(nest: Nest) -> bool:
    """Whether one element is part of several sums, so that tiles of results pay."""
    last = nest.reduced[-1]
    moving = [access for access, step in nest.strides(last) if step != 0]
    wide = [a for a in nest.spatial if a.extent != 1]
    return any(_stride_of(nest, access, axis) == 0 for access in moving for axis in wide)


def _extent(sch: Schedule, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if hasattr(extent, "value") else None


def _leading(nest: Nest) -> int:
    count = 0
    for axis in nest.axes:
        if axis.reduces:
            break
        count += 1
    return count


HEAVY = ("exp", "tanh", "sigmoid", "erf", "log", "pow", "sin", "cos")


def inline(sch: Schedule) -> None:
    """Elementwise steps become part of what reads them, unless they are dear and read by a reduction."""
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


def scaled(shape: Shape, **changes: int) -> Shape:
    """The shape with other values."""
    return replace(shape, **changes)
