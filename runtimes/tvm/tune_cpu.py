"""Tuning of what TVM generates: the shapes of default schedules (`schedule_rules.Shape`), measured for each function.

A function's key is its structural hash, so equal kernels of two models share what was measured. Candidates are the tile
sizes that its rules depend on; the search, the machines (this one, or those of a tracker) and the database are those of
the op library's knobs (`runtimes/tuning/engine.py`). A candidate is compiled and run in a process of its own
(`tune_worker`), and must give the default's results within rounding.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any

import tvm
from tvm import IRModule
from tvm.tirx import PrimFunc

from ...compiler.errors import InputError
from ...compiler.processor import processor
from ..tuning.candidates import Builder
from ..tuning.database import Database, Record, read_records
from ..tuning.engine import Engine, Known, Outcome
from ..tuning.machines import TURNS, Facts, Machine, Tracker, compared
from ..tuning.search import Batch, Search, Space
from ..tuning.selection import best, database_path
from .schedule_cpu import function_key, schedulable, schedule_function
from .schedule_rules import Shape

if TYPE_CHECKING:
    from ...compiler.program import Program

Progress = Callable[[str], None]

ROUNDS, CONFIRMING_ROUNDS = 20, 120
SIZE = 128
"""What an unknown size is measured with."""
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


def tune_functions(
    mod: IRModule,
    target: Any,
    seconds: float,
    database: Path,
    rpc: str | None = None,
    key: str = "isofold",
    progress: Progress | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Measure other shapes for the functions of a module (before `schedule_cpu`).

    rpc, key: `HOST:PORT` of a TVM tracker and the key of its servers, which then measure instead of this machine.
    sizes: values of symbolic sizes by name. Returns what `runtimes.tuning.tune.tune` does, a row for each function.
    Raises InputError: an unreadable database, an address where no tracker is, or all machines were lost.
    """
    functions: dict[str, tuple[str, PrimFunc]] = {}
    for variable, function in mod.functions.items():
        if schedulable(function):
            functions.setdefault(function_key(function), (str(variable.name_hint), function))
    tracker = None if rpc is None else Tracker.at(rpc, key)
    scratch = Path(tempfile.mkdtemp(prefix="isofold-tuning-"))
    try:
        with Builder(scratch, workers=1) as builder:
            kernels = GeneratedKernels(functions, target, sizes or {}, tracker, builder)
            return Engine(kernels, Database(database), seconds, tracker, progress or (lambda _: None)).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class GeneratedKernels:
    """Functions that `schedule_cpu` schedules, as `engine.Kernels`. builder: of the library that says what a server
    is."""

    def __init__(
        self,
        functions: Mapping[str, tuple[str, PrimFunc]],
        target: Any,
        sizes: Mapping[str, int],
        tracker: Tracker | None,
        builder: Builder,
    ) -> None:
        self.functions, self.target, self.tracker, self.builder = functions, target, tracker, builder
        self.sizes = tuple(sorted(sizes.items()))
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
        """One for each function whose schedule has a choice."""
        isa = isa_of(self.target)
        if isa > facts.isa:
            raise InputError(
                f"The kernels are for {isa}, which this processor has not",
                where=facts.host,
                got=f"{facts.processor} with {facts.isa}",
                hint="tune with --isa v3, or give its server another key",
            )
        found = []
        for key, (name, function) in self.functions.items():
            space = space_of(function, self.target)
            if len(space.values) == 0:
                continue
            records = known(isa, key, schedule_sources())
            workloads = [Sizes(name, self.sizes)]
            found.append(
                Search(isa, key, workloads, records, space=space, sources=schedule_sources(), title=name)
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
                "function": tvm.ir.save_json(self.functions[search.group][1]),
                "target": tvm.ir.save_json(self.target),
                "changes": list(batch.candidates),
                "rounds": rounds,
                **workload.to_json(),
            }
            answer = machine.ask(question, TURNS)
            failed = {int(i): text for i, text in answer["failed"].items()}
            yield [Outcome(batch.candidates[i], workload, text, "failed") for i, text in failed.items()]
            good = [c for i, c in enumerate(batch.candidates) if i not in failed]
            yield [Outcome(c, workload, r) for c, r in zip(good, compared(answer), strict=True)]


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


def tuned_shapes(database: Path | None, target: Any) -> dict[str, Shape]:
    """The shapes to take on this processor by function key; empty where there is no database."""
    if database is None or not database.exists():
        return {}
    default = Shape.of(target)
    groups: dict[str, list[Record]] = {}
    for record in read_records(database)[0]:
        if _is_current(record, target):
            groups.setdefault(record.group, []).append(record)
    chosen = {}
    for group, members in groups.items():
        better = best(members)
        if better is not None:
            chosen[group] = replace(default, **better[0])
    return chosen


def shapes_for_build(target: Any) -> dict[str, Shape]:
    """What this user's database has for this processor; a damaged one counts as none, as for the op library."""
    try:
        return tuned_shapes(database_path(), target)
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
) -> dict[str, Any]:
    """`tune_functions` for the kernels that TVM makes for a program."""
    from .compile_cpu import cpu_target, fused
    from .lower import lower

    target = cpu_target("llvm" if isa is None else f"llvm:x86-64-{isa}")
    module = fused(lower(program).module, target)
    return tune_functions(module, target, seconds, database or database_path(), rpc, key, progress)


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
