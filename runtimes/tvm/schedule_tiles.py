"""Sums of a tile of results stay in registers where rows of results lie at distances that only a call knows.

    unroll r, vector l: y[r * n + l] = 0               t = 0
    k: unroll r, vector l: y[r * n + l] += ...    →    k: t[r, l] += ...
                                                       unroll r, vector l: y[r * n + l] = t[r, l]

LLVM keeps sums in registers by itself where it can tell the rows apart, that is, where n is a constant.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, sym, tirx
from tvm_ffi import structural_map

from .schedule_nests import every, substitute, variables

Stmt = Any

MOST = 1024
"""Elements of the largest tile: registers of the widest instruction set twice."""
_TILES = (tirx.ForKind.VECTORIZED, tirx.ForKind.UNROLLED)


def keep_tiles(stmt: Stmt) -> Stmt:
    """The statement with tiles of sums in arrays of their own."""
    if isinstance(stmt, tirx.SeqStmt):
        parts = [keep_tiles(part) for part in stmt.seq]
        done: list[Stmt] = []
        for part in parts:
            kept = _kept(done[-1], part) if done else None
            if kept is None:
                done.append(part)
            else:
                done[-1:] = kept
        return tirx.SeqStmt(done) if len(done) > 1 else done[0]
    if isinstance(stmt, tirx.For):
        body = keep_tiles(stmt.body)
        return tirx.For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, stmt.annotations
        )
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, keep_tiles(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        otherwise = None if stmt.else_case is None else keep_tiles(stmt.else_case)
        return tirx.IfThenElse(stmt.condition, keep_tiles(stmt.then_case), otherwise)
    return stmt


def _kept(first: Stmt, sums: Stmt) -> list[Stmt] | None:
    """First values and sums of one tile with an array of its own; None where they are not that."""
    start, start_loops = _descend(first)
    update, loops = _descend(sums)
    tile = [loop for loop in loops if _is_tile(loop)]
    over = loops[: len(loops) - len(tile)]
    if start is None or update is None or not over or any(_is_tile(loop) for loop in over):
        return None
    if not all(_is_tile(loop) for loop in start_loops) or len(start_loops) != len(tile):
        return None
    buffer, extents = update.buffer, [int(loop.extent) for loop in tile]
    if not start.buffer.same_as(buffer) or not _rows_lie_apart(buffer, extents):
        return None
    if [int(loop.extent) for loop in start_loops] != extents or every(start.value, ir.TensorLoad):
        return None
    here = [loop.loop_var for loop in tile]
    names = dict(zip([loop.loop_var for loop in start_loops], here, strict=True))
    own = [load for load in every(update.value, ir.TensorLoad) if load.source.same_as(buffer)]
    moved = [substitute(index, names) for index in start.indices]
    if not _same(moved, update.indices) or not all(_same(load.indices, update.indices) for load in own):
        return None
    if {loop.loop_var for loop in over} & {v for index in update.indices for v in variables(index)}:
        return None
    array = tirx.decl_buffer([tirx.IntImm("int64", e) for e in extents], buffer.dtype, f"{buffer.name}_tile")

    def load(access: Any) -> Any:
        return tirx.BufferLoad(array, here) if access.source.same_as(buffer) else access

    inner = tirx.BufferStore(array, structural_map(update.value, (ir.TensorLoad, load)), here)
    begin = tirx.BufferStore(array, start.value, [loop.loop_var for loop in start_loops])
    fresh = [tirx.Var(str(var.name), var.ty.dtype) for var in here]
    renamed = dict(zip(here, fresh, strict=True))
    at = [substitute(index, renamed) for index in update.indices]
    end: Stmt = tirx.BufferStore(buffer, tirx.BufferLoad(array, fresh), at)
    for var, loop in reversed(list(zip(fresh, tile, strict=True))):
        end = tirx.For(var, loop.min, loop.extent, loop.kind, end, None, {})
    return [tirx.AllocBuffer(array), _nested(start_loops, begin), _nested(loops, inner), end]


def _descend(stmt: Stmt) -> tuple[Any | None, list[Any]]:
    """The store inside of loops, and the loops."""
    loops = []
    while isinstance(stmt, tirx.For):
        loops.append(stmt)
        stmt = stmt.body
    return (stmt if isinstance(stmt, tirx.BufferStore) else None), loops


def _is_tile(loop: Any) -> bool:
    return loop.kind in _TILES and isinstance(loop.extent, tirx.IntImm)


def _rows_lie_apart(buffer: Any, extents: list[int]) -> bool:
    """Whether a tile has rows, and the size of the buffer's does not say how far apart."""
    size = 1
    for extent in extents:
        size *= extent
    unknown = any(not isinstance(extent, tirx.IntImm) for extent in buffer.shape[1:])
    return unknown and sum(extent > 1 for extent in extents) > 1 and size <= MOST


def _same(one: Any, other: Any) -> bool:
    analyzer = sym.Analyzer()
    left = [analyzer.simplify(a - b) for a, b in zip(one, other, strict=True)]
    return all(isinstance(e, tirx.IntImm) and int(e) == 0 for e in left)


def _nested(loops: list[Any], body: Stmt) -> Stmt:
    for loop in reversed(loops):
        body = tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations
        )
    return body
