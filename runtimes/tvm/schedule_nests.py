"""What rules ask about a block of a schedule: its loops, and how its reads move along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import ir, sym, tirx
from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm_ffi import structural_map, structural_walk

Block = Any
Loop = Any

SMALL = 8192
"""Elements below which a loop nest is not worth other threads (a launch costs microseconds)."""


@dataclass(frozen=True)
class Axis:
    """One loop of a nest as TVM made it: its variable, extent and whether it reduces."""

    loop: Loop
    var: Any
    size: Any
    extent: int | None
    reduces: bool


class Nest:
    """A block of the schedule and the loops around it, before any of them was split."""

    def __init__(self, sch: Schedule, block: Block) -> None:
        self.block = block
        self.stmt = sch.get(block)
        self.name = str(self.stmt.name_hint)
        loops = sch.get_loops(block)
        self.axes: list[Axis] = []
        iters = list(self.stmt.iter_vars)
        for loop, it in zip(loops, iters, strict=False):
            extent = sch.get(loop).extent
            known = int(extent) if isinstance(extent, tirx.IntImm) else None
            self.axes.append(Axis(loop, it.var, extent, known, int(it.iter_type) == tirx.IterVar.CommReduce))
        self.regular = len(loops) == len(iters) and all(
            int(it.iter_type) in (tirx.IterVar.DataPar, tirx.IterVar.CommReduce) for it in iters
        )

    @property
    def spatial(self) -> list[Axis]:
        return [a for a in self.axes if not a.reduces]

    @property
    def reduced(self) -> list[Axis]:
        return [a for a in self.axes if a.reduces]

    @property
    def dtype(self) -> str:
        return str(self.stmt.writes[0].source.dtype)

    def size(self, axes: list[Axis] | None = None) -> int:
        """Iterations of the given loops (default: all); an unknown extent counts as many."""
        total = 1
        for axis in self.axes if axes is None else axes:
            total *= 4096 if axis.extent is None else axis.extent
        return total

    def strides(self, axis: Axis) -> list[tuple[Any, int | None]]:
        """For each element read: its buffer and how far it moves with the axis (None: not by a constant)."""
        found = []
        for access in loads(self.stmt):
            if any(buffer_of(access).same_as(write.source) for write in self.stmt.writes):
                continue
            found.append((access, stride(access, axis.var)))
        return found

    def written_stride(self, axis: Axis) -> int | None:
        """Elements by which the first written element moves when the axis advances by one."""
        steps = [stride(store, axis.var) for store in stores(self.stmt)]
        return steps[0] if steps else None


def every(root: Any, kind: Any) -> list[Any]:
    """All nodes of a class in a statement or expression, children before parents."""
    found: list[Any] = []

    def keep(node: Any) -> None:
        found.append(node)

    structural_walk(root, (kind, keep))
    return found


def variables(expr: Any) -> set[Any]:
    """The variables of an expression."""
    return set(every(expr, ir.Var))


def substitute(stmt: Any, values: dict[Any, Any]) -> Any:
    """`stmt` with its variables replaced by the given values."""
    return structural_map(stmt, (ir.Var, lambda v: values.get(v, v)))


def loads(stmt: Any) -> list[Any]:
    """All elements that a block reads, in its body (not its initial value)."""
    return every(stmt.body, ir.TensorLoad)


def stores(stmt: Any) -> list[Any]:
    """All elements that a block writes."""
    return every(stmt.body, tirx.BufferStore)


def buffer_of(access: Any) -> Any:
    """The buffer of an element that is read or written."""
    return access.buffer if isinstance(access, tirx.BufferStore) else access.source


def stride(access: Any, var: Any) -> int | None:
    """Elements from one value of `var` to the next: 0 where the access does not use it, None where that varies."""
    analyzer = sym.Analyzer()
    steps = 0
    inner: Any = 1
    for index, size in reversed(list(zip(access.indices, buffer_of(access).shape, strict=True))):
        if any(var.same_as(v) for v in variables(index)):
            moved = analyzer.simplify(substitute(index, {var: var + 1}) - index)
            distance = analyzer.simplify(moved * inner)
            if not isinstance(distance, tirx.IntImm):
                return None if not isinstance(moved, tirx.IntImm) else _FAR
            steps += int(distance)
        inner = inner * size
    return steps


def is_multiple(size: Any, of: int) -> bool:
    """Whether a size is known to be a multiple of a number."""
    left = sym.Analyzer().simplify(tirx.floormod(size, of))
    return isinstance(left, tirx.IntImm) and int(left) == 0


_FAR = 1 << 30
"""A constant number of rows of unknown length."""


def has_call(stmt: Any, names: tuple[str, ...]) -> bool:
    """Whether a block calls one of these operators."""
    return any(str(getattr(call.op, "name", "")).rpartition(".")[2] in names for call in every(stmt, ir.Call))


def without_empty(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function without loops whose results have no elements, which TVM divides by when it vectorizes them."""
    realize = function.body
    block = getattr(realize, "block", None)
    if block is None:
        return function
    body = block.body
    steps = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    left = [step for step in steps if not _writes_nothing(step)]
    if len(left) == len(steps):
        return function
    rest = (
        tirx.SeqStmt(left) if len(left) > 1 else left[0] if left else tirx.Evaluate(tirx.IntImm("int32", 0))
    )
    whole = SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, rest, block.init, block.alloc_buffers
    )
    return function.with_body(SBlockRealize(realize.iter_values, realize.predicate, whole))


def _writes_nothing(step: Any) -> bool:
    written = [store.buffer for store in every(step, tirx.BufferStore)]
    return bool(written) and all(any(_is_zero(extent) for extent in buffer.shape) for buffer in written)


def _is_zero(extent: Any) -> bool:
    return isinstance(extent, tirx.IntImm) and int(extent) == 0


def nests(sch: Schedule) -> list[Nest]:
    """The blocks of the function, in order."""
    return [Nest(sch, block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
