"""Tuning of the op library: the knobs of its kernels, measured on linears (`isofold tune`)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ...compiler.errors import InputError
from .candidates import Builder, forget_old_objects, hashed_sources
from .database import Database
from .engine import CONFIRMING_ROUNDS, ROUNDS, Engine, Known, Outcome
from .machines import Facts, Machine, Tracker
from .search import Batch, Search
from .selection import database_path
from .workloads import Workload, default_workloads, groups_of, reduced

__all__ = ["tune"]

Say = Callable[[str], None]


def tune(
    workloads: Sequence[Workload] | None = None,
    *,
    seconds: float = 600,
    threads: int | None = None,
    rpc: str | None = None,
    key: str = "isofold",
    database: Path | None = None,
    isa: str | None = None,
    say: Say | None = None,
    seed: int = 0,
    values: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Search the knobs of the kernels that these workloads use, for at most about `seconds`.

    Args:
        workloads: None: the default shape classes. At most four for each group of kernels are kept, the largest.
        threads: of the default shape classes; None: all cores of this machine.
        rpc, key: `HOST:PORT` of a TVM tracker and the key of its servers, which then measure instead of this machine.
        database: None: `database_path()`. What it has is not measured again.
        isa: `v3` or `v4`; None: the best that each machine has.
        say: told about the progress; seed: of the search.
        values: allow only these values of some knobs (for tests and experiments).

    Returns:
        {database, processors, seconds, measured, lost, notes, workloads: [{workload, group, isa, processor, tried,
        before, after, ratio, noise, knobs}]}; before and after in seconds, after None where nothing better was found.

    Raises:
        InputError: a workload, address or database that cannot be used, or all machines were lost.
        ToolchainError: g++ or TVM is missing.
    """
    say = say or (lambda _: None)
    found = Database(database or database_path())
    tracker = None if rpc is None else Tracker.at(rpc, key)
    chosen = list(workloads or default_workloads(threads or len(os.sched_getaffinity(0))))
    forget_old_objects()
    scratch = Path(tempfile.mkdtemp(prefix="isofold-tuning-"))
    try:
        # Compiling while another machine measures costs nothing; here it would disturb.
        with Builder(scratch, workers=len(os.sched_getaffinity(0))) as builder:
            kernels = LibraryKernels(builder, tracker, chosen, isa, seed, values or {})
            engine = Engine(kernels, found, seconds, tracker, say)
            say("tune: compile the harness")
            builder.any_library()
            result = engine.run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not engine.searches and not engine.measured:
        found.notes.append(
            f"{seconds:.0f} s are too short to compile the first candidates; what was compiled is kept"
        )
    return result


class LibraryKernels:
    """The op library's kernels as `engine.Kernels`."""

    rounds = ROUNDS, CONFIRMING_ROUNDS

    def __init__(
        self,
        builder: Builder,
        tracker: Tracker | None,
        workloads: list[Workload],
        isa: str | None,
        seed: int,
        values: Mapping[str, Sequence[int]],
    ) -> None:
        self.builder, self.tracker, self.workloads = builder, tracker, workloads
        self.isa, self.seed, self.values = isa, seed, values

    def hire(self) -> Machine:
        """This machine, or the next free server."""
        return Machine(self.tracker)

    def facts(self, machine: Machine) -> Facts:
        """What the machine is."""
        return machine.facts(self.builder.any_library())

    def searches(self, facts: Facts, known: Known) -> list[Search]:
        """One for each group of kernels that the workloads use on this kind of machine."""
        isa = self.isa or facts.isa
        if isa > facts.isa:
            raise InputError(
                f"This processor has no {isa}",
                where=facts.host,
                got=f"{facts.processor} with {facts.isa}",
            )
        groups: dict[str, list[Workload]] = {}
        for workload in reduced(self.workloads, isa):
            for group in groups_of(workload, isa):
                groups.setdefault(group, []).append(workload)
        found = []
        for group, members in groups.items():
            sources = hashed_sources(group)
            records = known(isa, group, sources)
            values = dict(self.values)
            found.append(Search(isa, group, members, records, seed=self.seed, values=values, sources=sources))
        return found

    def compare(
        self, machine: Machine, facts: Facts, search: Search, batch: Batch, rounds: int
    ) -> Iterator[list[Outcome]]:
        """Build a batch and compare it on every workload."""
        workloads = cast("Sequence[Workload]", batch.workloads)
        needed = workloads or cast("Sequence[Workload]", search.workloads)
        made = self.builder.libraries(batch.isa, batch.group, needed, [search.default, *batch.candidates])
        default = made[0]
        if isinstance(default, str):
            raise InputError("The kernels with their defaults do not compile", got=default)
        twin = default.with_name(f"{default.stem}-twin.so")
        shutil.copyfile(default, twin)
        good: dict[int, Path] = {}
        for i, library in enumerate(made[1:]):
            if isinstance(library, str):
                yield [Outcome(batch.candidates[i], needed[0], library, "failed")]
            else:
                good[i] = library
        for workload in workloads if good else ():
            results = machine.compare(
                [default, twin, *good.values()], workload, facts, batch.isa, rounds, search.exact
            )
            found = list(zip(good, results, strict=True))
            yield [Outcome(batch.candidates[i], workload, result) for i, result in found]
            for i, result in found:
                if isinstance(result, str):
                    del good[i]
        for path in (default, twin, *(library for library in made if isinstance(library, Path))):
            path.unlink(missing_ok=True)
