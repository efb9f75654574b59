"""Kernels that TVM generates for the GPU: dlight's schedules, or MetaSchedule's traces where tuning found better ones.

Traces are invented and kept as for the CPU (`runtimes/tvm/traces.py`), for functions whose sizes are all known: a
decoding step with a fixed batch. What has unknown sizes keeps dlight's schedule, which is made for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.relax import transform
from tvm.s_tir import dlight
from tvm_ffi import structural_hash

from ..schedule_nests import every
from ..schedule_traces import Traced, TraceError, apply_trace, has_unknown_sizes
from ..tune_cpu import schedule_sources

NAME = "isofold_stage0"
_SCHEDULED = "tirx.is_scheduled"
_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Launch:
    """A function on its own sizes."""

    name: str

    def to_json(self) -> dict[str, Any]:
        """Plain data: the key of records; the name is no part of it."""
        return {"sizes": {}}


@dataclass(frozen=True)
class Generic:
    """A function that nobody has scheduled, as something to be measured."""

    name: str
    function: tirx.PrimFunc

    @property
    def group(self) -> str:
        """What the database knows it by."""
        return group_of(self.function)

    @property
    def launch(self) -> Launch:
        """What it is measured on."""
        return Launch(self.name)

    @property
    def sources(self) -> str:
        """A hash of what measurements depend on: how traces are applied, and TVM, which has dlight too."""
        return schedule_sources()


@dataclass(frozen=True)
class GenericUnit:
    """A scheduled function, as `candidates.Unit` is kernels: what a toolchain compiles and a worker runs."""

    function: tirx.PrimFunc

    def functions(self) -> dict[str, Any]:
        """TIR functions by the names they are exported under."""
        return {NAME: self.function.with_attr("global_symbol", NAME)}

    def spec(self, library: Any, sizes: Any) -> dict[str, Any]:
        """What a worker must know (`tune_worker.Spec`): the last parameters are written."""
        del sizes
        parameters = {f"p{i}": p for i, p in enumerate(self.function.params)}
        tensors = {n: [[int(s) for s in p.shape], str(p.dtype)] for n, p in parameters.items()}
        written = written_of(self.function)
        results = [n for n, p in parameters.items() if any(p.same_as(w) for w in written)]
        order = [n for n in parameters if n not in results] + results
        reads = {NAME: len(parameters) - len(results)}
        assert order == list(parameters), "results come last"
        stages = [[NAME, order]]
        return {
            "library": str(library.path), "tensors": tensors, "stages": stages, "reads": reads, "results": results,
        }  # fmt: skip


def written_of(function: tirx.PrimFunc) -> list[Any]:
    """The parameters that a function writes."""
    stored = [store.buffer for store in every(function.body, tirx.BufferStore)]
    return [p for p in function.params if any(p.same_as(buffer) for buffer in stored)]


def group_of(function: tirx.PrimFunc) -> str:
    """What the database knows a function by: its structure, not its name."""
    return f"cuda_generic_{structural_hash(function, map_free_vars=True) & 0xFFFFFFFFFFFFFFFF:016x}"


def fused(module: tvm.IRModule, target: Any) -> tvm.IRModule:
    """A planned module with everything but the dialect's kernels fused: what is left to schedule."""
    with target:
        return tvm.transform.Sequential(
            [
                transform.CanonicalizeBindings(),
                transform.AnnotateTIROpPattern(),
                transform.FoldConstant(),
                transform.FuseOps(),
                transform.FuseTIR(),
                transform.DeadCodeElimination(),
            ]
        )(module)


def generic_functions(module: tvm.IRModule) -> list[Generic]:
    """The functions of a fused module that MetaSchedule can have traces for, each once."""
    found: dict[str, Generic] = {}
    for variable, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc) or _SCHEDULED in (function.attrs or {}):
            continue
        if not has_unknown_sizes(function) and all(str(p.dtype) in _DTYPES for p in function.params):
            made = Generic(str(variable.name_hint), function)
            found.setdefault(made.group, made)
    return list(found.values())


def with_dlight(module: tvm.IRModule, target: Any) -> tvm.IRModule:
    """What is not scheduled yet, by dlight's rules."""
    with target:
        return dlight.ApplyDefaultSchedule(
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        )(module)


def default_of(function: tirx.PrimFunc, target: Any) -> tirx.PrimFunc:
    """One function with dlight's schedule."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return with_dlight(module, target)["main"]


def by_trace(function: tirx.PrimFunc, traced: Traced) -> tirx.PrimFunc:
    """A function under a trace. Raises TraceError."""
    return apply_trace(function, traced).mod["main"].with_attr(_SCHEDULED, True)


def with_traces(
    module: tvm.IRModule, trace_of: Callable[[str], Traced | None]
) -> tuple[tvm.IRModule, dict[str, str]]:
    """The module with the traces that tuning found, by group; and by function why one could not be applied."""
    made, failed = {}, {}
    for variable, function in module.functions_items():
        own = isinstance(function, tirx.PrimFunc) and _SCHEDULED not in (function.attrs or {})
        traced = trace_of(group_of(function)) if own else None
        if traced is not None:
            try:
                function = by_trace(function, traced)
            except TraceError as error:
                failed[str(variable.name_hint)] = str(error)
        made[variable] = function
    return tvm.IRModule(made, attrs=module.attrs, global_infos=module.global_infos), failed
