"""Schedules that MetaSchedule found, as text: a trace of schedule primitives with the decisions that were sampled.

A trace is found on a function whose sizes are all known (`representative`) and applied to the function itself. Where
its sizes are unknown, the outermost part of every split takes what is left, inner parts keep the sizes that were found,
and what comes after MetaSchedule's own rules (threads, vectors, the first values of sums) is done here, since
MetaSchedule's fuses loops over unknown extents. Applying one needs nothing of MetaSchedule itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import sym, tirx
from tvm.s_tir import SBlockRealize, Schedule, Trace
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from .schedule_loops import share
from .schedule_nests import every, substitute, variables

POSTPROCESSING = "EnterPostproc"
UNROLL = "pragma_auto_unroll_max_step"
_LONGEST = 64
"""Lanes of the longest loop that becomes one vector."""
_PART = 32
"""Lanes of the vectors that a longer one becomes."""
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod, tirx.Max, tirx.Min)
_SPLIT_OF = {"SamplePerfectTile", "SamplePartitionedTile"}


class TraceError(RuntimeError):
    """A trace cannot be applied to a function; the message says why."""


@dataclass(frozen=True)
class Traced:
    """A schedule that MetaSchedule found for a function: its trace, as text."""

    text: str


def number_of(text: str) -> int:
    """The number of a trace: the value of the knob `TRACE` in records."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def text_of(trace: Trace) -> str:
    """A trace as text."""
    return json.dumps(_plain(trace.as_json()), separators=(",", ":"))


def _plain(value: Any) -> Any:
    """TVM's containers and constants as Python's."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, tirx.IntImm | tirx.FloatImm):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value]


def apply_trace(function: PrimFunc, traced: Traced) -> Schedule:
    """The function scheduled by a trace. Raises TraceError where the trace does not apply to it."""
    sch = Schedule(function)
    open_ended = has_unknown_sizes(function)
    try:
        instructions, decisions = json.loads(traced.text)
        if open_ended:
            instructions, decisions = _opened(instructions, decisions)
        Trace.apply_json_to_schedule([instructions, decisions], sch)
        if open_ended:
            _finish(sch)
    except (ScheduleError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise TraceError(f"{type(error).__name__}: {lines[-1][:300]}") from None
    return sch


# ---- sizes


def sizes_of(function: PrimFunc) -> dict[str, Any]:
    """The function's unknown sizes by name."""
    found: dict[str, Any] = {}
    for parameter in function.params:
        shape = getattr(parameter, "shape", None)
        names = {parameter} if shape is None else {v for extent in shape for v in variables(extent)}
        found.update({str(v.name): v for v in sorted(names, key=lambda v: str(v.name))})
    return found


def has_unknown_sizes(function: PrimFunc) -> bool:
    """Whether a loop may have an extent that only a call knows."""
    return bool(sizes_of(function))


def representative(function: PrimFunc, sizes: Mapping[str, int], size: int) -> PrimFunc:
    """The function with these values of unknown sizes (`size`: of all others); loops and blocks keep their names."""
    # A size is one variable in the shapes and, where it is an argument too, another of the same name.
    values: dict[Any, Any] = {}
    for parameter in function.params:
        shape = getattr(parameter, "shape", None)
        for v in {parameter} if shape is None else {v for extent in shape for v in variables(extent)}:
            values[v] = tirx.IntImm("int64", sizes.get(str(v.name), size))
    if not values:
        return function
    tensors = [p for p in function.params if getattr(p, "shape", None) is not None]
    analyzer = sym.Analyzer()

    def folded(e: Any) -> Any:
        both = isinstance(e.a, tirx.IntImm) and isinstance(e.b, tirx.IntImm)
        return analyzer.simplify(e) if both else e

    without = PrimFunc(tensors, function.body, function.ret_type, attrs=function.attrs)
    made = structural_map(substitute(without, values), [(kind, folded) for kind in _ARITHMETIC])
    assert isinstance(made, PrimFunc)
    return made


# ---- traces on unknown sizes


def _opened(instructions: list[Any], decisions: list[Any]) -> tuple[list[Any], list[Any]]:
    """A trace without its postprocessing, whose splits have constant inner parts and outer ones that take the rest."""
    sampled: dict[int, Any] = dict(decisions)
    factors: dict[str, int] = {}
    kept: list[Any] = []
    left: list[Any] = []
    for index, (name, inputs, attributes, outputs) in enumerate(instructions):
        if name == POSTPROCESSING:
            break
        if name in _SPLIT_OF and index in sampled:
            factors.update(zip(outputs, sampled[index], strict=True))
            continue
        if name == "Split":
            inputs = [inputs[0], None, *(factors.get(str(v), v) for v in inputs[2:])]
        if index in sampled:
            left.append([len(kept), sampled[index]])
        kept.append([name, inputs, attributes, outputs])
    return kept, left


def _finish(sch: Schedule) -> None:
    """Threads, vectors, unrolling and first values of sums, where a trace has only said that they are wanted."""
    root = sch.get_sblock("root")
    steps = None
    for key, value in dict(sch.get(root).annotations).items():
        if str(key).startswith("meta_schedule."):
            steps = int(value) if str(key).endswith("unroll_explicit") else steps
            sch.unannotate(root, str(key))
    for block in _leaves(sch, root):
        for key in list(sch.get(block).annotations):
            if str(key).startswith("meta_schedule."):
                sch.unannotate(block, str(key))
        _vectorize(sch, block)
    for block in _leaves(sch, root):  # several may lie in one loop, which has its threads and steps then
        _parallelize(sch, block)
        outer = sch.get_loops(block)[:1]
        if steps and outer and UNROLL not in sch.get(outer[0]).annotations:
            sch.annotate(outer[0], UNROLL, steps)
            sch.annotate(outer[0], "pragma_unroll_explicit", 1)
    for block in _leaves(sch, root):
        reduced = next((loop for loop in sch.get_loops(block) if _reduces(sch, block, loop)), None)
        if reduced is not None and sch.get(block).init is not None:
            sch.decompose_reduction(block, reduced)


def _leaves(sch: Schedule, root: Any) -> list[Any]:
    return [b for b in sch.get_child_blocks(root) if not sch.get_child_blocks(b)]


def _bindings(sch: Schedule, block: Any) -> Iterator[tuple[Any, Any]]:
    """The iterators of a block and the loop expressions bound to them."""
    stmt = sch.get(block)
    for realize in every(sch.mod["main"].body, SBlockRealize):
        if realize.block.same_as(stmt):
            yield from zip(stmt.iter_vars, realize.iter_values, strict=True)


def _reduces(sch: Schedule, block: Any, loop: Any) -> bool:
    """Whether a loop adds to sums of a block."""
    var = sch.get(loop).loop_var
    return any(
        int(it.iter_type) == tirx.IterVar.CommReduce and any(var.same_as(v) for v in variables(value))
        for it, value in _bindings(sch, block)
    )


def _vectorize(sch: Schedule, block: Any) -> None:
    """The innermost loop of a block, where its results lie next to each other; a long one in parts."""
    loops = sch.get_loops(block)
    if not loops:
        return
    loop, stmt = loops[-1], sch.get(block)
    extent = sch.get(loop).extent
    short = isinstance(extent, tirx.IntImm) and int(extent) <= _LONGEST
    if (short and int(extent) == 1) or _reduces(sch, block, loop):
        return
    var = sch.get(loop).loop_var
    moving = [it.var for it, value in _bindings(sch, block) if any(var.same_as(v) for v in variables(value))]
    write = stmt.writes[0].region
    last = variables(write[-1].min) if len(write) else set()
    if len(moving) == 1 and any(moving[0].same_as(v) for v in last):
        sch.vectorize(loop if short else sch.split(loop, factors=[None, _PART])[1])


def _parallelize(sch: Schedule, block: Any) -> None:
    """The outer loops of a block that are shared by all blocks inside them."""
    run: list[Any] = []
    for loop in sch.get_loops(block):
        body = sch.get(loop).body
        if _reduces(sch, block, loop) or sch.get(loop).kind != tirx.ForKind.SERIAL:
            break
        run.append(loop)
        if not isinstance(body, tirx.For):
            break
    if run:
        share(sch, run, 1 << 30)
