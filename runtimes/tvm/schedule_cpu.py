"""The default schedule of kernels that TVM makes for the CPU: outer loops in parallel, inner ones as vectors.

`schedule_cpu` takes every function of a module that is not scheduled yet through the rules of `schedule_rules`: first
the rules for whole functions, else nest by nest. What scheduled a function is its attribute `isofold.schedule`, which
`schedule_report` lists. A function comes back as loops (`schedule_lower`), so that no later pass schedules it again.

Where tuning found a schedule of MetaSchedule's to be faster (`schedule_traces.Traced`), that is applied instead; one
that no longer can be gives way to the default, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import IRModule
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx import PrimFunc
from tvm_ffi import structural_hash

from .schedule_loops import Shape
from .schedule_lower import to_loops
from .schedule_math import with_fast_math
from .schedule_nests import Nest, nests, without_empty
from .schedule_rules import NEST_RULES, Rows, inline
from .schedule_traces import Traced, TraceError, apply_trace

ATTRIBUTE = "isofold.schedule"
TUNED = "isofold.tuned"
"""Attribute of functions whose shape or trace tuning found."""
TRACE_FAILED = "the tuned trace cannot be applied"
"""Beginning of what the report says of a function that has its default schedule in place of a trace."""
SCHEDULED = "tirx.is_scheduled"


def schedule_cpu(
    mod: IRModule, target: Any, database: Mapping[str, Shape | Traced] | None = None
) -> IRModule:
    """Schedule every kernel of the module that is not scheduled yet.

    database: shapes or traces by `function_key`, where tuning found better ones than the default
    (`tune_cpu.tuned_schedules`).
    """
    made = {}
    for name, function in mod.functions.items():
        if schedulable(function):
            found = database.get(function_key(function)) if database else None
            function = _tuned(function, target, found)
        made[name] = function
    return IRModule(made, attrs=mod.attrs, global_infos=mod.global_infos)


def _tuned(function: PrimFunc, target: Any, found: Shape | Traced | None) -> PrimFunc:
    if found is None:
        return schedule_function(function, target)
    try:
        return schedule_function(function, target, found).with_attr(TUNED, True)
    except TraceError as error:
        default = schedule_function(function, target)
        said = f"{TRACE_FAILED} ({error}); {default.attrs[ATTRIBUTE]}"
        return default.with_attr(ATTRIBUTE, said)


def schedulable(function: Any) -> bool:
    """Whether it is a kernel that nobody has scheduled."""
    return isinstance(function, PrimFunc) and not (function.attrs and SCHEDULED in function.attrs)


def function_key(function: PrimFunc) -> str:
    """What tuning knows a kernel by: its structure, not its name."""
    return f"schedule_{structural_hash(function, map_free_vars=True) & 0xFFFFFFFFFFFFFFFF:016x}"


def schedule_report(mod: IRModule) -> dict[str, str]:
    """What scheduled each kernel, and why it could."""
    return {
        str(name.name_hint): str(function.attrs[ATTRIBUTE])
        for name, function in mod.functions.items()
        if isinstance(function, PrimFunc) and function.attrs and ATTRIBUTE in function.attrs
    }


def schedule_function(function: PrimFunc, target: Any, found: Shape | Traced | None = None) -> PrimFunc:
    """One function as loops with threads and vectors. Raises TraceError, for a trace."""
    shape = found if isinstance(found, Shape) else Shape.of(target)
    function = without_empty(function)
    if not _has_blocks(function):
        return function.with_attr({SCHEDULED: True, ATTRIBUTE: "as it is: loops without blocks"})
    if isinstance(found, Traced):
        return _traced(function, target, found, shape)
    sch = Schedule(function)
    inline(sch)
    sch, said = _whole(sch, shape) or _by_nests(sch, shape)
    lowered = to_loops(with_fast_math(sch.mod["main"]), target, shape.lanes, shape.chains)
    return lowered.with_attr({SCHEDULED: True, ATTRIBUTE: said})


def _traced(function: PrimFunc, target: Any, found: Traced, shape: Shape) -> PrimFunc:
    sch = apply_trace(function, found)
    try:
        lowered = to_loops(with_fast_math(sch.mod["main"]), target, shape.lanes, shape.chains)
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise TraceError(f"{type(error).__name__}: {lines[-1][:300]}") from None
    return lowered.with_attr({SCHEDULED: True, ATTRIBUTE: "a trace of MetaSchedule"})


def _whole(sch: Schedule, shape: Shape) -> tuple[Schedule, str] | None:
    trial = sch.copy()
    try:
        why = Rows().apply(trial, shape)
    except ScheduleError:
        return None
    return None if why is None else (trial, f"{Rows.name}: {why}")


def _by_nests(sch: Schedule, shape: Shape) -> tuple[Schedule, str]:
    said = []
    for name in [nest.name for nest in nests(sch)]:
        for rule in NEST_RULES:
            trial = sch.copy()
            try:
                why = rule.apply(trial, Nest(trial, trial.get_sblock(name)), shape)
            except ScheduleError:
                continue
            if why is not None:
                sch = trial
                said.append(f"{name}: {rule.name}: {why}")
                break
    return sch, "; ".join(said)


def _has_blocks(function: PrimFunc) -> bool:
    try:
        return bool(nests(Schedule(function)))
    except ScheduleError:
        return False
