"""The default schedule of kernels that TVM makes for the CPU: outer loops in parallel, inner ones as vectors.

`schedule_cpu` takes every function of a module that is not scheduled yet through the rules of `schedule_rules`: first
the rules for whole functions, else nest by nest. What scheduled a function is its attribute `isofold.schedule`, which
`schedule_report` lists. A function comes back as loops (`schedule_lower`), so that no later pass schedules it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import IRModule
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx import PrimFunc
from tvm_ffi import structural_hash

from .schedule_lower import to_loops
from .schedule_math import with_fast_math
from .schedule_nests import Nest, nests
from .schedule_rules import NEST_RULES, Rows, Shape, inline

ATTRIBUTE = "isofold.schedule"
TUNED = "isofold.tuned"
"""Attribute of functions whose shape tuning found."""
SCHEDULED = "tirx.is_scheduled"


def schedule_cpu(mod: IRModule, target: Any, database: Mapping[str, Shape] | None = None) -> IRModule:
    """Schedule every kernel of the module that is not scheduled yet.

    database: shapes by `function_key`, where tuning found better ones than the default (`tune_cpu.tuned_shapes`).
    """
    made = {}
    for name, function in mod.functions.items():
        if schedulable(function):
            shape = database.get(function_key(function)) if database else None
            function = schedule_function(function, target, shape)
            if shape is not None:
                function = function.with_attr(TUNED, True)
        made[name] = function
    return IRModule(made, attrs=mod.attrs, global_infos=mod.global_infos)


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


def schedule_function(function: PrimFunc, target: Any, shape: Shape | None = None) -> PrimFunc:
    """One function as loops with threads and vectors."""
    shape = shape or Shape.of(target)
    if not _has_blocks(function):
        return function.with_attr({SCHEDULED: True, ATTRIBUTE: "as it is: loops without blocks"})
    sch = Schedule(function)
    inline(sch)
    sch, said = _whole(sch, shape) or _by_nests(sch, shape)
    lowered = to_loops(with_fast_math(sch.mod["main"]), target, shape.lanes, shape.chains)
    return lowered.with_attr({SCHEDULED: True, ATTRIBUTE: said})


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
