"""Rules of the default schedule for nests without sums: copies with a border, and everything elementwise."""

from __future__ import annotations

from tvm.s_tir import Schedule

from .schedule_loops import Shape, share, vectors
from .schedule_nests import SMALL, Axis, Nest, buffer_of, has_call, loads, stores


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
