"""Loops over the same rows become one, and what is kept of a row between them shrinks to a row.

    parallel i: a[i, :] = f(x[i, :])                    parallel i: a'[:] = f(x[i, :])
    parallel i: y[i, :] = g(a[i, :])             →                  y[i, :] = g(a'[:])

Softmax and norms are three or four such loops. Legal where every element that one loop writes and a later one reads
is at the loops' own index: the leading indices of all accesses to it are the same expression of the loop variable.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx
from tvm_ffi import structural_map

from .schedule_nests import every, substitute

Stmt = Any

MOST = 16384
"""Elements of a row that may lie on a thread's stack."""


def join_rows(body: Stmt) -> Stmt:
    """The statement with runs of such loops joined, where it is a sequence of loops behind allocations."""
    if isinstance(body, tirx.AttrStmt):
        return tirx.AttrStmt(body.node, body.attr_key, body.value, join_rows(body.body))
    if not isinstance(body, tirx.SeqStmt):
        return body
    parts = _flat(body)
    buffers = {part.buffer: part for part in parts if isinstance(part, tirx.AllocBuffer)}
    done: list[Stmt] = []
    for part in parts:
        before = done[-1] if done else None
        if before is not None and isinstance(before, tirx.For) and isinstance(part, tirx.For):
            joined = _joined(before, part, buffers)
            if joined is not None:
                done[-1] = joined
                continue
        done.append(part)
    for buffer, allocation in buffers.items():
        users = [i for i, part in enumerate(done) if part is not allocation and _uses(part, buffer)]
        if len(users) == 1:
            smaller = _with_row(done[users[0]], buffer)
            if smaller is not None:
                done[users[0]] = smaller
                done = [part for part in done if part is not allocation]
    return done[0] if len(done) == 1 else tirx.SeqStmt(done)


def _flat(body: Stmt) -> list[Stmt]:
    parts: list[Stmt] = []
    for part in body.seq:
        parts.extend(_flat(part) if isinstance(part, tirx.SeqStmt) else [part])
    return parts


def _joined(one: Any, two: Any, buffers: dict[Any, Any]) -> Any | None:
    """Both loops as one, or None where that is not legal."""
    parallel = tirx.ForKind.PARALLEL
    if one.kind != parallel or two.kind != parallel or str(one.extent) != str(two.extent):
        return None
    moved = substitute(two.body, {two.loop_var: one.loop_var})
    for buffer in _written(one.body) & _touched(moved):
        if _row_of([one.body, moved], buffer, one.loop_var) is None:
            return None
    if _written(moved) & _touched(one.body) - _written(one.body):
        return None
    body = tirx.SeqStmt([one.body, moved])
    return tirx.For(one.loop_var, one.min, one.extent, one.kind, body, None, one.annotations)


def _accesses(stmt: Stmt) -> list[tuple[Any, Any, bool]]:
    """(buffer, indices, writes) of every access."""
    reads = [(load.source, load.indices, False) for load in every(stmt, ir.TensorLoad)]
    return [*reads, *((store.buffer, store.indices, True) for store in every(stmt, tirx.BufferStore))]


def _written(stmt: Stmt) -> set[Any]:
    return {buffer for buffer, _, writes in _accesses(stmt) if writes}


def _touched(stmt: Stmt) -> set[Any]:
    return {buffer for buffer, _, _ in _accesses(stmt)}


def _uses(stmt: Stmt, buffer: Any) -> bool:
    return any(buffer.same_as(b) for b in _touched(stmt))


def _row_of(stmts: list[Stmt], buffer: Any, row: Any) -> list[str] | None:
    """The leading indices with the row's variable, where they are the same in all accesses and it is in no other."""
    common: list[str] | None = None
    for stmt in stmts:
        for accessed, indices, _ in _accesses(stmt):
            if not accessed.same_as(buffer):
                continue
            using = [_mentions(index, row) for index in indices]
            lead = sum(using)
            if lead == 0 or not all(using[:lead]):
                return None
            mine = [str(index) for index in indices[:lead]]
            if common is not None and mine != common:
                return None
            common = mine
    return common


def _mentions(expr: Any, var: Any) -> bool:
    return any(v.same_as(var) for v in every(expr, ir.Var))


def _with_row(loop: Any, buffer: Any) -> Any | None:
    """The loop with a buffer of its own for one row, or None where accesses do not allow it or the row is large."""
    if not isinstance(loop, tirx.For) or loop.kind != tirx.ForKind.PARALLEL:
        return None
    lead = _row_of([loop.body], buffer, loop.loop_var)
    if lead is None:
        return None
    rest = list(buffer.shape[len(lead) :]) or [tirx.IntImm("int64", 1)]
    size = 1
    for extent in rest:
        if not isinstance(extent, tirx.IntImm):
            return None
        size *= int(extent)
    if size > MOST:
        return None
    row = tirx.decl_buffer(rest, buffer.dtype, f"{buffer.name}_row")

    def inside(indices: Any) -> list[Any]:
        return list(indices[len(lead) :]) or [tirx.IntImm("int64", 0)]

    def load(access: Any) -> Any:
        return tirx.BufferLoad(row, inside(access.indices)) if access.source.same_as(buffer) else access

    def store(access: Any) -> Any:
        if not access.buffer.same_as(buffer):
            return access
        return tirx.BufferStore(row, access.value, inside(access.indices))

    body = structural_map(loop.body, [(ir.TensorLoad, load), (tirx.BufferStore, store)])
    whole = tirx.SeqStmt([tirx.AllocBuffer(row), body])
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, whole, None, loop.annotations)
