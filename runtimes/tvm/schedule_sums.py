"""Sums (and extremes) over neighbours run over a vector of partial results, which is summed at the end.

    for k in n: y = y + f(k)        →      p[0:L] = 0;  for k in n // L: p[0:L] = p[0:L] + f(k L + 0:L)
                                           for k in the rest: y = y + f(k);  y = y + sum of p, by halves

LLVM may not do this to floats, whose sums depend on their order. It is for innermost loops (or perfect nests of them)
whose result does not move, and whose reads are neighbours or do not move.
"""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx

from .schedule_nests import every, stride, substitute, variables

Stmt = Any
Expr = Any

_COMBINE = (tirx.Add, tirx.Max, tirx.Min)


def vector_sums(stmt: Stmt, lanes: int, chains: int) -> Stmt:
    """The statement with such loops rewritten; vectors of `lanes`, or `chains` of them where the loop is long."""
    if isinstance(stmt, tirx.For):
        made = _rewritten(stmt, lanes, chains) if stmt.kind == tirx.ForKind.SERIAL else None
        if made is not None:
            return made
        body = vector_sums(stmt.body, lanes, chains)
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, None, stmt.annotations)
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([vector_sums(part, lanes, chains) for part in stmt.seq])
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, vector_sums(stmt.body, lanes, chains))
    if isinstance(stmt, tirx.IfThenElse):
        otherwise = None if stmt.else_case is None else vector_sums(stmt.else_case, lanes, chains)
        return tirx.IfThenElse(stmt.condition, vector_sums(stmt.then_case, lanes, chains), otherwise)
    return stmt


def _rewritten(loop: Any, lanes: int, chains: int) -> Stmt | None:
    nest = [loop]
    while isinstance(nest[-1].body, tirx.For) and nest[-1].body.kind == tirx.ForKind.SERIAL:
        nest.append(nest[-1].body)
    store, inner = nest[-1].body, nest[-1]
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.value, _COMBINE):
        return None
    loop_vars = {one.loop_var for one in nest}
    if any(variables(index) & loop_vars for index in store.indices):
        return None
    element = _element(store)
    if element is None or not _neighbours(element, inner.loop_var):
        return None
    extent = inner.extent
    known = int(extent) if isinstance(extent, tirx.IntImm) else None
    if known is not None and known < lanes:
        return None
    width = lanes if known is not None and known < 4 * lanes * chains else lanes * chains
    return _vector_form(nest, store, element, width)


def _element(store: Any) -> Expr | None:
    """What is combined with the result."""
    a, b = store.value.a, store.value.b
    for own, other in ((a, b), (b, a)):
        same = isinstance(own, ir.TensorLoad) and own.source.same_as(store.buffer)
        if same and [str(i) for i in own.indices] == [str(i) for i in store.indices]:
            return (
                None
                if any(read.source.same_as(store.buffer) for read in every(other, ir.TensorLoad))
                else other
            )
    return None


def _neighbours(element: Expr, var: Any) -> bool:
    steps = [stride(read, var) for read in every(element, ir.TensorLoad)]
    return 1 in steps and all(step in (0, 1) for step in steps)


def _identity(store: Any) -> Expr:
    dtype = str(store.buffer.dtype)
    if isinstance(store.value, tirx.Add):
        return tirx.const(0, dtype)
    return tirx.min_value(dtype) if isinstance(store.value, tirx.Max) else tirx.max_value(dtype)


def _vector_form(nest: list[Any], store: Any, element: Expr, width: int) -> Stmt:
    inner = nest[-1]
    kind = str(inner.loop_var.ty.dtype)
    combine = type(store.value)
    part = tirx.decl_buffer([tirx.IntImm(kind, width)], store.buffer.dtype, "partial", scope="local")
    own = tirx.BufferLoad(store.buffer, store.indices)
    full = tirx.floordiv(inner.extent, tirx.IntImm(kind, width))

    def over(count: int, body: Any) -> Stmt:
        lane = tirx.Var("lane", kind)
        return _for(lane, tirx.IntImm(kind, count), body(lane), tirx.ForKind.VECTORIZED)

    def at(index: Expr) -> Expr:
        return tirx.BufferLoad(part, [index])

    def put(index: Expr, value: Expr) -> Stmt:
        return tirx.BufferStore(part, value, [index])

    block, rest = tirx.Var("block", kind), tirx.Var("rest", kind)
    step = over(
        width,
        lambda lane: put(
            lane, combine(at(lane), substitute(element, {inner.loop_var: block * width + inner.min + lane}))
        ),
    )
    last = substitute(element, {inner.loop_var: full * width + inner.min + rest})
    left = tirx.floormod(inner.extent, tirx.IntImm(kind, width))
    body: Stmt = tirx.SeqStmt(
        [
            _for(block, full, step),
            _for(rest, left, tirx.BufferStore(store.buffer, combine(own, last), store.indices)),
        ]
    )
    for outer in reversed(nest[:-1]):
        body = _for(outer.loop_var, outer.extent, body, start=outer.min)
    parts = [tirx.AllocBuffer(part), over(width, lambda lane: put(lane, _identity(store))), body]
    half = width // 2
    while half >= 1:
        if half == 1:
            zero, one = tirx.IntImm(kind, 0), tirx.IntImm(kind, 1)
            parts.append(put(zero, combine(at(zero), at(one))))
        else:
            parts.append(over(half, lambda lane, half=half: put(lane, combine(at(lane), at(lane + half)))))
        half //= 2
    parts.append(tirx.BufferStore(store.buffer, combine(own, at(tirx.IntImm(kind, 0))), store.indices))
    return tirx.SeqStmt(parts)


def _for(
    var: Any, extent: Expr, body: Stmt, kind: Any = tirx.ForKind.SERIAL, start: Expr | None = None
) -> Stmt:
    return tirx.For(
        var, tirx.IntImm(var.ty.dtype, 0) if start is None else start, extent, kind, body, None, {}
    )
