"""From scheduled blocks to loops, with the ends of split loops taken apart.

A loop of extent n that is split for vectors of L leaves `if i * L + lane < n` around every statement, and TVM computes
a vector under a condition lane by lane. Here the condition is asked once for the whole tile, where its outer loops
begin:

    if i * L + L <= n:   the tile without conditions (vectorized, unrolled)
    else:                the same over n - i * L lanes (a vector where that is a constant, else a plain loop)

TVM's own LoopPartition does this for some loops only, and leaves the last tile to conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, sym, tirx
from tvm.s_tir import SBlock, SBlockRealize

from .schedule_join import join_rows
from .schedule_nests import every, substitute, variables
from .schedule_sums import vector_sums
from .schedule_tiles import keep_tiles

Stmt = Any
Expr = Any

_TO_LOOPS = (
    s_tir.transform.CanonicalizeLoop,
    s_tir.transform.LowerInitBlock,
    s_tir.transform.PlanAndUpdateBufferAllocationLocation,
    s_tir.transform.ConvertBlocksToOpaque,
    s_tir.transform.CompactBufferAllocation,
    s_tir.transform.LowerMatchBuffer,
    s_tir.transform.LowerOpaqueBlock,
)

_TILES = (tirx.ForKind.VECTORIZED, tirx.ForKind.UNROLLED)


@dataclass(frozen=True)
class _End:
    """`rest + lane < bound` for the lanes of tile loops of one size."""

    rest: Expr
    bound: Expr
    size: int

    @property
    def key(self) -> tuple[str, str, int]:
        return str(self.rest), str(self.bound), self.size


def to_loops(function: tirx.PrimFunc, target: Any, lanes: int, chains: int) -> tirx.PrimFunc:
    """A scheduled function without blocks (but one around all of it): loops over the same rows joined, tiles free of
    conditions. lanes, chains: as in `schedule_loops.Shape`."""
    with target:
        module = tvm.ir.transform.Sequential([make() for make in _TO_LOOPS])(tvm.IRModule({"main": function}))
    lowered = module["main"]
    body = vector_sums(join_rows(lowered.body), lanes, chains)
    peeled = lowered.with_body(keep_tiles(_peel(body, _bound(body))))
    peeled = peeled.with_body(_whole_registers(peeled.body))
    unique = s_tir.transform.ConvertSSA()(tvm.IRModule({"main": peeled}))["main"]
    root = SBlock([], [], [], "root", unique.body)
    return unique.with_body(SBlockRealize([], True, root))


def _bound(stmt: Stmt) -> frozenset[Any]:
    """Variables that a statement gives values."""
    loops = {loop.loop_var for loop in every(stmt, tirx.For)}
    return frozenset(loops | {bind.var for bind in every(stmt, tirx.Bind)})


# ---- vectors of any length


def _whole_registers(stmt: Stmt) -> Stmt:
    """Vectorized loops in pieces of powers of two: LLVM keeps 16 + 8 lanes in registers, and 24 in memory."""
    if isinstance(stmt, tirx.For):
        body = _whole_registers(stmt.body)
        fixed = isinstance(stmt.extent, tirx.IntImm)
        if stmt.kind != tirx.ForKind.VECTORIZED or not fixed or int(stmt.extent) in _POWERS:
            return _with_body(stmt, body)
        kind, at, left, parts = stmt.loop_var.ty.dtype, 0, int(stmt.extent), []
        if left <= 0:
            return tirx.Evaluate(tirx.IntImm("int32", 0))
        while left:
            lanes = next(power for power in _POWERS if power <= left)
            moved = substitute(body, {stmt.loop_var: stmt.loop_var + tirx.IntImm(kind, at)}) if at else body
            form = tirx.ForKind.VECTORIZED if lanes > 1 else tirx.ForKind.SERIAL
            parts.append(tirx.For(stmt.loop_var, stmt.min, tirx.IntImm(kind, lanes), form, moved, None, {}))
            at, left = at + lanes, left - lanes
        return tirx.SeqStmt(parts)
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_whole_registers(part) for part in stmt.seq])
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _whole_registers(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        otherwise = None if stmt.else_case is None else _whole_registers(stmt.else_case)
        return tirx.IfThenElse(stmt.condition, _whole_registers(stmt.then_case), otherwise)
    return stmt


_POWERS = (64, 32, 16, 8, 4, 2, 1)


# ---- finding ends


def _conjuncts(condition: Expr) -> Iterator[Expr]:
    if isinstance(condition, tirx.And):
        yield from _conjuncts(condition.a)
        yield from _conjuncts(condition.b)
    else:
        yield condition


def _children(stmt: Stmt) -> list[Stmt]:
    if isinstance(stmt, tirx.SeqStmt):
        return list(stmt.seq)
    parts = (getattr(stmt, name, None) for name in ("body", "then_case", "else_case"))
    return [part for part in parts if isinstance(part, tirx.Stmt)]


def _end(comparison: Expr, tiles: tuple[Any, ...]) -> tuple[_End, Any] | None:
    """The end that a comparison means, and its tile loop."""
    if not isinstance(comparison, tirx.LT):
        return None
    used = variables(comparison.a)
    for loop in reversed(tiles):
        lane = loop.loop_var
        if not any(lane.same_as(v) for v in used):
            continue
        analyzer = sym.Analyzer()
        zero = tirx.const(0, lane.ty.dtype)
        rest = analyzer.simplify(substitute(comparison.a, {lane: zero}))
        if not _is_zero(analyzer.simplify(comparison.a - rest - lane)):
            return None
        if any(lane.same_as(v) for v in variables(comparison.b)):
            return None
        return _End(rest, comparison.b, int(loop.extent)), loop
    return None


def _is_zero(expr: Expr) -> bool:
    return isinstance(expr, tirx.IntImm) and int(expr) == 0


def _is_tile(stmt: Stmt) -> bool:
    return isinstance(stmt, tirx.For) and stmt.kind in _TILES and isinstance(stmt.extent, tirx.IntImm)


def _ends(stmt: Stmt, tiles: tuple[Any, ...] = ()) -> Iterator[_End]:
    if _is_tile(stmt):
        tiles = (*tiles, stmt)
    if isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None:
        for comparison in _conjuncts(stmt.condition):
            found = _end(comparison, tiles)
            if found is not None:
                yield found[0]
    for child in _children(stmt):
        yield from _ends(child, tiles)


# ---- taking them apart


def _peel(stmt: Stmt, waiting: frozenset[Any]) -> Stmt:
    for end in _ends(stmt):
        if not (variables(end.rest) | variables(end.bound)) & waiting:
            return _apart(stmt, end, waiting)
    if isinstance(stmt, tirx.For):
        return _with_body(stmt, _peel(stmt.body, waiting - {stmt.loop_var}))
    if isinstance(stmt, tirx.SeqStmt):
        inner = waiting
        parts = []
        for part in stmt.seq:
            if isinstance(part, tirx.Bind):
                inner = inner - {part.var}
            parts.append(_peel(part, inner))
        return tirx.SeqStmt(parts)
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _peel(stmt.body, waiting))
    if isinstance(stmt, tirx.IfThenElse):
        otherwise = None if stmt.else_case is None else _peel(stmt.else_case, waiting)
        return tirx.IfThenElse(stmt.condition, _peel(stmt.then_case, waiting), otherwise)
    return stmt


def _apart(stmt: Stmt, end: _End, waiting: frozenset[Any]) -> Stmt:
    """The statement for whole tiles, for the last one, and for those that lie behind the end."""
    analyzer = sym.Analyzer()
    whole = analyzer.simplify(end.rest + end.size <= end.bound)
    if isinstance(whole, tirx.IntImm) and int(whole):
        return _peel(_without(stmt, end, None), waiting)
    kind = end.rest.ty.dtype
    fixed = isinstance(end.bound, tirx.IntImm) and _is_zero(
        analyzer.simplify(tirx.floormod(end.rest, end.size))
    )
    if fixed:
        left = int(end.bound) % end.size
        otherwise = _peel(_without(stmt, end, tirx.IntImm(kind, 0)), waiting)
        if left:
            last = _peel(_without(stmt, end, tirx.IntImm(kind, left)), waiting)
            otherwise = tirx.IfThenElse(analyzer.simplify(end.rest < end.bound), last, otherwise)
    else:
        # A loop of a negative number of lanes has none.
        otherwise = _peel(_without(stmt, end, analyzer.simplify(end.bound - end.rest)), waiting)
    return tirx.IfThenElse(whole, _peel(_without(stmt, end, None), waiting), otherwise)


def _without(stmt: Stmt, end: _End, lanes: Expr | None, tiles: tuple[Any, ...] = ()) -> Stmt:
    """The statement for tiles of `lanes` lanes (None: all), so that the end's conditions hold."""
    if isinstance(stmt, tirx.For):
        inner = (*tiles, stmt) if _is_tile(stmt) else tiles
        body = _without(stmt.body, end, lanes, inner)
        if lanes is not None and _is_tile(stmt) and any(e.key == end.key for e in _ends_of(stmt)):
            fixed = isinstance(lanes, tirx.IntImm) and int(lanes) > 1
            kind = stmt.kind if fixed else tirx.ForKind.SERIAL
            return tirx.For(stmt.loop_var, stmt.min, lanes, kind, body, None, {})
        return _with_body(stmt, body)
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_without(part, end, lanes, tiles) for part in stmt.seq])
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _without(stmt.body, end, lanes, tiles))
    if isinstance(stmt, tirx.IfThenElse):
        then = _without(stmt.then_case, end, lanes, tiles)
        otherwise = None if stmt.else_case is None else _without(stmt.else_case, end, lanes, tiles)
        if otherwise is not None:
            return tirx.IfThenElse(stmt.condition, then, otherwise)
        left = [c for c in _conjuncts(stmt.condition) if not _means(c, tiles, end)]
        for condition in reversed(left):
            then = tirx.IfThenElse(condition, then, None)
        return then
    return stmt


def _means(comparison: Expr, tiles: tuple[Any, ...], end: _End) -> bool:
    found = _end(comparison, tiles)
    return found is not None and found[0].key == end.key


def _ends_of(loop: Any) -> Iterator[_End]:
    """Ends whose lanes are this loop's."""

    def inside(stmt: Stmt) -> Iterator[_End]:
        if isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None:
            for comparison in _conjuncts(stmt.condition):
                found = _end(comparison, (loop,))
                if found is not None:
                    yield found[0]
        for child in _children(stmt):
            yield from inside(child)

    yield from inside(loop.body)


def _with_body(loop: Any, body: Stmt) -> Stmt:
    return tirx.For(
        loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations
    )
