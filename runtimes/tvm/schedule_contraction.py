"""Rules of the default schedule for contractions: tiles of results stay in registers while the sums run."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from .schedule_elementwise import Elementwise
from .schedule_loops import Shape, share, vectors
from .schedule_nests import Axis, Nest, buffer_of, is_multiple


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
        columns = self._columns(lane, shape)
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
        if lane.extent is None and above:
            # Rows of unknown length may be short: with them innermost, weights would be read again for each.
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
            along = stride_of(nest, access, last)
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
            if moving and all(stride_of(nest, access, axis) == 0 for access in moving):
                return axis
        return None

    @staticmethod
    def _columns(lane: Axis, shape: Shape) -> int:
        width = shape.columns
        if lane.extent is not None:
            return max(shape.lanes, 1) if lane.extent < width else width
        whole = [w for w in (width, shape.lanes) if is_multiple(lane.size, w)]
        return whole[0] if whole else width


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
            if step not in (0, 1) and stride_of(nest, access, last) == 1
        ]
        if len(turned) != 1:
            return None
        access = turned[0]
        # Turning costs as much as a few rows of sums; and it must be read again.
        again = [a for a in rows if stride_of(nest, access, a) == 0]
        if not again or nest.size(again) < 4:
            return None
        place = {str(v): d for d, v in enumerate(access.indices)}
        if str(lane.var) not in place or place.get(str(last.var)) != len(access.indices) - 1:
            return None
        at = next(
            i for i, read in enumerate(sch.get(nest.block).reads) if read.source.same_as(buffer_of(access))
        )
        swapped = place[str(lane.var)]
        copy = sch.cache_read(nest.block, at, "global")

        def turn(*i: Any) -> list[Any]:
            order = [*i]
            order[swapped], order[-1] = order[-1], order[swapped]
            return order

        sch.transform_layout(nest.block, ("read", at), turn)
        Elementwise().apply(sch, Nest(sch, copy), shape)
        why = Contraction().apply(sch, Nest(sch, nest.block), shape)
        return None if why is None else f"one side turned first, then {why}"


def stride_of(nest: Nest, access: Any, axis: Axis) -> int | None:
    return next(step for known, step in nest.strides(axis) if known.same_as(access))


def reuses(nest: Nest) -> bool:
    """Whether one element is part of several sums, so that tiles of results pay."""
    last = nest.reduced[-1]
    moving = [access for access, step in nest.strides(last) if step != 0]
    wide = [a for a in nest.spatial if a.extent != 1]
    return any(stride_of(nest, access, axis) == 0 for access in moving for axis in wide)
