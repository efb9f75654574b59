"""Tuning of what TVM generates: shapes of default schedules, and MetaSchedule's traces, measured for each function.

A function's key is its structural hash, so equal kernels of two models share what was measured. Candidates are the tile
sizes that its rules depend on (`schedule_loops.Shape`) and schedules that MetaSchedule invents (`traces`,
`schedule_traces`), in turns; the search, the machines (this one, or those of a tracker) and the database are those of
the op library's knobs (`runtimes/tuning/engine.py`). A candidate is compiled and run in a process of its own
(`tune_worker`), and must give the default's results within rounding. Functions share the time by what they cost: the
time of their default and how often the module calls them.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any

import tvm
from torch import Tensor
from torch.utils import _pytree as pytree
from tvm import IRModule, relax, sym, tirx
from tvm.tirx import PrimFunc

from ...compiler.errors import InputError
from ...compiler.graph import value
from ...compiler.processor import processor
from ..tuning.candidates import Builder
from ..tuning.database import Database, Record, read_records
from ..tuning.engine import Engine, Known, Outcome
from ..tuning.machines import TURNS, Facts, Machine, Tracker, compared
from ..tuning.search import TRACE, Batch, Candidate, Search, Space
from ..tuning.selection import best, database_path
from .schedule_cpu import function_key, schedulable, schedule_function
from .schedule_loops import Shape
from .schedule_nests import substitute, variables
from .schedule_traces import Traced, sizes_of
from .symbols import size_of, solve_for_symbol, variable_name
from .traces import MOST, MetaSchedule, Workshop

if TYPE_CHECKING:
    from ...compiler.program import Program

Progress = Callable[[str], None]

ROUNDS, CONFIRMING_ROUNDS = 20, 120
SIZE = 128
"""What an unknown size is measured with."""
SHORTEST = 1e-5
"""Seconds below which functions count alike."""
_WORKER = "isofold.runtimes.tvm.tune_worker"


@dataclass(frozen=True)
class Sizes:
    """A function with values of its unknown sizes: by name, and of all others."""

    name: str
    sizes: tuple[tuple[str, int], ...] = ()
    size: int = SIZE

    def to_json(self) -> dict[str, Any]:
        """Plain data; the name is no part of the key."""
        return {"sizes": dict(self.sizes), "size": self.size}


@dataclass(frozen=True)
class Generated:
    """A function to be tuned, at its sizes, and how often its module calls it. smaller: other sizes, at which traces
    must be right too."""

    function: PrimFunc
    sizes: Sizes
    smaller: dict[str, int]
    calls: int


def tune_functions(
    mod: IRModule,
    target: Any,
    seconds: float,
    database: Path,
    rpc: str | None = None,
    key: str = "isofold",
    progress: Progress | None = None,
    sizes: Mapping[str, int] | None = None,
    traces: int = MOST,
) -> dict[str, Any]:
    """Measure other schedules for the functions of a module (before `schedule_cpu`).

    rpc, key: `HOST:PORT` of a TVM tracker and the key of its servers, which then measure instead of this machine.
    sizes: values of symbolic sizes by name: of the module's Relax functions (where they call a kernel, its own follow
        from them), or of its kernels. traces: the most of MetaSchedule's schedules that are measured for each.
    Returns what `runtimes.tuning.tune.tune` does, a row for each function.
    Raises InputError: an unreadable database, an address where no tracker is, or all machines were lost.
    """
    functions: dict[str, Generated] = {}
    calls = calls_of(mod)
    for variable, function in mod.functions.items():
        if schedulable(function):
            group, name = function_key(function), str(variable.name_hint)
            mine = calls.get(name, [])
            own, fewer = (sizes_in(function, mine, given) for given in (sizes or {}, smaller(sizes or {})))
            known = Sizes(name, tuple(sorted(own.items())))
            if not mine:
                fewer = smaller({n: own.get(n, known.size) for n in sizes_of(function)})
            one = functions.get(group) or Generated(function, known, fewer, 0)
            functions[group] = replace(one, calls=one.calls + max(len(mine), 1))
    tracker = None if rpc is None else Tracker.at(rpc, key)
    scratch, workshop = Path(tempfile.mkdtemp(prefix="isofold-tuning-")), Workshop()
    try:
        with Builder(scratch, workers=1) as builder:
            kernels = GeneratedKernels(functions, target, tracker, builder, workshop, traces)
            return Engine(kernels, Database(database), seconds, tracker, progress or (lambda _: None)).run()
    finally:
        workshop.close()
        shutil.rmtree(scratch, ignore_errors=True)


def calls_of(mod: IRModule) -> dict[str, list[relax.Call]]:
    """Calls of each kernel in the module's Relax functions."""
    found: dict[str, list[relax.Call]] = {}

    def see(node: Any) -> None:
        if isinstance(node, relax.Call) and node.op == tvm.ir.Op.get("relax.call_tir"):
            found.setdefault(str(node.args[0].name_hint), []).append(node)

    for function in mod.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, see)
    return found


def smaller(sizes: Mapping[str, int]) -> dict[str, int]:
    """Odd sizes below others: ends of tiles are elsewhere."""
    return {name: max(1, size * 2 // 3 | 1) for name, size in sizes.items()}


def sizes_in(function: PrimFunc, calls: list[relax.Call], given: Mapping[str, int]) -> dict[str, int]:
    """The function's unknown sizes, as its first call says, or else by name."""
    known = {**given, **(sizes_at(calls[0], function, given) if calls else {})}
    return {name: known[name] for name in sizes_of(function) if name in known}


def sizes_at(call: relax.Call, function: PrimFunc, sizes: Mapping[str, int]) -> dict[str, int]:
    """What a kernel's unknown sizes are at a call where the caller's are these; those that say themselves."""
    found: dict[str, int] = {}

    def bind(own: Any, given: Any) -> None:
        values = {
            v: tirx.IntImm("int64", sizes[str(v.name)]) for v in variables(given) if str(v.name) in sizes
        }
        number = sym.Analyzer().simplify(substitute(given, values))
        if isinstance(own, tvm.ir.Var) and isinstance(number, tirx.IntImm):
            found[str(own.name)] = int(number)

    results = call.ty_args[0]
    results = list(results.fields) if isinstance(results, relax.TupleType) else [results]
    given = [*(getattr(a, "ty", None) for a in call.args[1].fields), *results]
    scalars = [*call.args[1].fields, *results]
    for parameter, kind, scalar in zip(function.params, given, scalars, strict=False):
        if getattr(parameter, "shape", None) is None:
            bind(parameter, scalar)
        elif isinstance(kind, relax.TensorType) and kind.shape is not None:
            for own, one in zip(parameter.shape, kind.shape.values, strict=False):
                bind(own, one)
    return found


class GeneratedKernels:
    """Functions that `schedule_cpu` schedules, as `engine.Kernels`.

    builder: of the library that says what a server is; workshop, traces: who invents schedules, and how many for each
    function at most.
    """

    def __init__(
        self,
        functions: Mapping[str, Generated],
        target: Any,
        tracker: Tracker | None,
        builder: Builder,
        workshop: Workshop,
        traces: int,
    ) -> None:
        self.functions, self.target, self.tracker, self.builder = functions, target, tracker, builder
        self.workshop, self.traces = workshop, traces
        self.rounds = ROUNDS, CONFIRMING_ROUNDS

    def hire(self) -> Machine:
        """This machine, or the next free server."""
        return Machine(self.tracker, _WORKER)

    def facts(self, machine: Machine) -> Facts:
        """What the machine is."""
        if self.tracker is None:
            return Facts(processor(), node(), isa_of(self.target), len(os.sched_getaffinity(0)), 0)
        return machine.facts(self.builder.any_library())

    def searches(self, facts: Facts, known: Known) -> list[Search]:
        """One for each function whose schedule has a choice, which with MetaSchedule all have."""
        isa = isa_of(self.target)
        if isa > facts.isa:
            raise InputError(
                f"The kernels are for {isa}, which this processor has not",
                where=facts.host,
                got=f"{facts.processor} with {facts.isa}",
                hint="tune with --isa v3, or give its server another key",
            )
        found = []
        for key, generated in self.functions.items():
            function, sizes = generated.function, generated.sizes
            space = space_of(function, self.target)
            if len(space.values) == 0 and not self.traces:
                continue
            records = known(isa, key, schedule_sources())
            inventor = MetaSchedule(
                self.workshop, function, self.target, dict(sizes.sizes), sizes.size, facts.cores, self.traces
            )
            found.append(
                Search(
                    isa,
                    key,
                    [sizes],
                    records,
                    space=space,
                    sources=schedule_sources(),
                    title=sizes.name,
                    inventor=inventor if self.traces else None,
                    weight=partial(weight, generated.calls),
                )
            )
        return found

    def compare(
        self, machine: Machine, facts: Facts, search: Search, batch: Batch, rounds: int
    ) -> Iterator[list[Outcome]]:
        """Compile and compare a batch, in the machine's process."""
        del facts
        for workload in batch.workloads:
            question = {
                "do": "function",
                "function": tvm.ir.save_json(self.functions[search.group].function),
                "target": tvm.ir.save_json(self.target),
                "changes": [self._change(search, candidate) for candidate in batch.candidates],
                "rounds": rounds,
                "smaller": self.functions[search.group].smaller,
                **workload.to_json(),
            }
            answer = machine.ask(question, TURNS)
            failed = {int(i): text for i, text in answer["failed"].items()}
            yield [Outcome(batch.candidates[i], workload, text, "failed") for i, text in failed.items()]
            good = [c for i, c in enumerate(batch.candidates) if i not in failed]
            yield [Outcome(c, workload, r) for c, r in zip(good, compared(answer), strict=True)]

    @staticmethod
    def _change(search: Search, candidate: Candidate) -> dict[str, Any]:
        return {TRACE: search.traces[candidate[TRACE]]} if TRACE in candidate else dict(candidate)


def weight(calls: int, seconds: float | None) -> float:
    """What a function costs its module; one that was not measured yet is measured first."""
    return math.inf if seconds is None else calls * max(seconds, SHORTEST)


def space_of(function: PrimFunc, target: Any) -> Space:
    """The shapes that a function's rules depend on; no values where they depend on none."""
    default = Shape.of(target)
    said = str(schedule_function(function, target).attrs["isofold.schedule"])
    tiles = "rows of them at once" in said
    values: dict[str, tuple[int, ...]] = {}
    if tiles:
        values["rows"] = (1, 2, 4, 6, 8, 12) if default.lanes == 16 else (2, 4, 6)
    if "contraction" in said:
        values["columns"] = tuple(default.lanes * n for n in (1, 2, 3, 4))
    if "row" in said and not tiles:
        values["chains"] = (1, 2, 4)
    return Space(values, {name: getattr(default, name) for name in values}, exact=False)


def tuned_schedules(database: Path | None, target: Any) -> dict[str, Shape | Traced]:
    """The shapes and traces to take on this processor by function key; empty where there is no database."""
    if database is None or not database.exists():
        return {}
    default = Shape.of(target)
    groups: dict[str, list[Record]] = {}
    for record in read_records(database)[0]:
        if _is_current(record, target):
            groups.setdefault(record.group, []).append(record)
    chosen: dict[str, Shape | Traced] = {}
    for group, members in groups.items():
        better = best(members)
        if better is None:
            continue
        values, records = better
        if TRACE in values:
            chosen[group] = Traced(next(iter(records.values())).trace or "")
        else:
            chosen[group] = replace(default, **values)
    return chosen


def schedules_for_build(target: Any) -> dict[str, Shape | Traced]:
    """What this user's database has for this processor; a damaged one counts as none, as for the op library."""
    try:
        return tuned_schedules(database_path(), target)
    except InputError:
        return {}


def tune_program(
    program: Program,
    seconds: float,
    database: Path | None = None,
    isa: str | None = None,
    progress: Progress | None = None,
    rpc: str | None = None,
    key: str = "isofold",
    traces: int = MOST,
) -> dict[str, Any]:
    """`tune_functions` for the kernels that TVM makes for a program, at the sizes of its example inputs."""
    from .compile_cpu import cpu_target, fused
    from .lower import lower

    target = cpu_target("llvm" if isa is None else f"llvm:x86-64-{isa}")
    module = fused(lower(program).module, target)
    path, sizes = database or database_path(), example_sizes(program)
    return tune_functions(module, target, seconds, path, rpc, key, progress, sizes, traces)


def example_sizes(program: Program) -> dict[str, int]:
    """What a program's symbols are on its example inputs, by the names that kernels have for them."""
    inputs = [place for place in program.placeholders if isinstance(value(place), Tensor)]
    given = [
        a for a in pytree.tree_leaves((program.example_args, program.example_kwargs)) if isinstance(a, Tensor)
    ]
    found: dict[str, int] = {}
    for place, tensor in zip(inputs, given, strict=False):
        for size, actual in zip(map(size_of, value(place).shape), tensor.shape, strict=False):
            solved = None if isinstance(size, int) else solve_for_symbol(size)
            if solved is not None:
                symbol, factor, rest = solved
                found[variable_name(symbol)] = (actual - rest) // factor
                found[f"{variable_name(symbol)}_size"] = actual
    return found


def _is_current(record: Record, target: Any) -> bool:
    here = record.processor == processor() and record.sources == schedule_sources()
    return here and record.group.startswith("schedule_") and record.isa == isa_of(target)


def isa_of(target: Any) -> str:
    """The name of the target's instruction set in records."""
    return f"v{4 if Shape.of(target).lanes == 16 else 3}"


@cache
def schedule_sources() -> str:
    """A hash of what measurements depend on: the rules and TVM."""
    digest = hashlib.sha256(tvm.__version__.encode())
    for path in sorted(Path(__file__).resolve().parent.glob("schedule_*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
