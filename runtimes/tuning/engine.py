"""The loop of every tuning run: machines take batches of candidates from searches, and every result is kept at once.

What is tuned says how (`Kernels`): the searches there are on a kind of machine, and how a batch is built and compared.
Everything else is the same for the op library's knobs, for kernels that TVM generates, and for a GPU's: a thread for
each machine, the search that has had the least time for its weight goes next, a lost machine's work is given to the
others, and a candidate that goes down alone with its machine twice is recorded as crashed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from ...compiler.errors import InputError, IsofoldError
from .child import LostError
from .database import Database, Record
from .machines import Comparison, Facts, Machine, Tracker
from .search import TRACE, Batch, Candidate, InventionError, Measurable, Search

__all__ = ["CONFIRMING_ROUNDS", "ROUNDS", "Engine", "Kernels", "Outcome", "SkippedError"]

Say = Callable[[str], None]
Known = Callable[[str, str, str], list[Record]]
"""The records of an instruction set, a group and a hash of sources on the machine that asks."""

BATCH = 4
ROUNDS, CONFIRMING_ROUNDS = 31, 201
_EVERY = 5.0
"""Seconds between two lines of progress."""
_LOSSES = 3
"""A thread gives up after losing this many machines in a row."""


@dataclass(frozen=True)
class Outcome:
    """What a candidate did on a workload: times, or what is wrong (status as in `Record`)."""

    candidate: Candidate
    workload: Measurable
    result: Comparison | str
    status: str = "wrong"


class SkippedError(RuntimeError):
    """A search cannot go on in this run, while others can; the message says why."""


class Kernels(Protocol):
    """What the engine needs to know of the kernels that are tuned."""

    rounds: tuple[int, int]
    """Rounds of a first and of a confirming measurement."""

    def hire(self) -> Machine:
        """A machine to measure on, for one thread. Whether it answers shows only when it is asked."""

    def facts(self, machine: Machine) -> Facts:
        """Processor, instruction sets and cache of the machine. Raises LostError."""

    def searches(self, facts: Facts, known: Known) -> list[Search]:
        """The searches on this kind of machine. Raises InputError where it cannot run them."""

    def compare(
        self, machine: Machine, facts: Facts, search: Search, batch: Batch, rounds: int
    ) -> Iterator[list[Outcome]]:
        """Build a batch and compare it; results as they come. Raises LostError, and SkippedError for its search."""


class Engine:
    """One tuning run until the time is up or nothing is left; state that machines' threads share is under `lock`."""

    def __init__(
        self, kernels: Kernels, database: Database, seconds: float, tracker: Tracker | None, say: Say
    ) -> None:
        self.kernels, self.database, self.tracker, self.say = kernels, database, tracker, say
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.lock = threading.Lock()
        self.searches: dict[str, dict[str, Search]] = {}
        """By kind of machine, then by group."""
        self.measured, self.lost = 0, list[str]()
        self._spent: dict[int, float] = {}
        self._running, self._said = 0, 0.0
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._machines: set[Machine] = set()

    def over(self) -> bool:
        """Whether the time is up or the run was stopped."""
        return self._stop.is_set() or time.monotonic() >= self.deadline

    def run(self) -> dict[str, Any]:
        """Measure, and sum up: see `tune.tune`. Raises InputError where no machine could be used."""
        size = 1 if self.tracker is None else self.tracker.servers()
        threads = [threading.Thread(target=self._guarded, daemon=True) for _ in range(size)]
        try:
            for thread in threads:
                thread.start()
            self._wait(threads)
        finally:
            self._stop.set()
            for machine in list(self._machines):
                machine.close()  # after Ctrl-C: what they are measuring is not waited for
            for thread in threads:
                thread.join(timeout=30)
        for error in self._errors:
            raise error
        if self.lost and not self.searches:
            raise InputError(
                "No machine could be used for tuning",
                got="; ".join(dict.fromkeys(self.lost)),
                hint="what was measured before is kept; look at the servers' own output",
            )
        self.database.notes += self._unused_records()
        return {
            "database": str(self.database.path),
            "processors": sorted(self.searches),
            "seconds": time.monotonic() - self.started,
            "measured": self.measured,
            "lost": self.lost,
            "notes": self.database.notes,
            "workloads": [
                row
                for processor, mine in self.searches.items()
                for search in mine.values()
                for row in summary(search, processor, self.database)
            ],
        }

    def _unused_records(self) -> list[str]:
        """What the database has on the same kernels that does not count here: of other machines, or other versions."""
        current = {
            (search.group, search.isa): search.sources
            for mine in self.searches.values()
            for search in mine.values()
        }
        same = [r for r in self.database.records if (r.group, r.isa) in current]
        others = [r for r in same if r.processor not in self.searches]
        old = [r for r in same if r.processor in self.searches and r.sources != current[r.group, r.isa]]
        notes = []
        if others:
            names = ", ".join(sorted({r.processor for r in others}))
            notes.append(
                f"{len(others)} results of other processors ({names}) are kept and do not count here"
            )
        if old:
            notes.append(
                f"{len(old)} results of another version of the kernels or of TVM are kept and do not count"
            )
        return notes

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        """Until all work is done, or the time is up and no machine has work: some may still wait in a tracker's
        queue."""
        for thread in threads:
            while thread.is_alive() and not (self.over() and not self._running):
                thread.join(timeout=0.2)  # a join without limit would not see Ctrl-C

    def _guarded(self) -> None:
        try:
            self._crew_member()
        except BaseException as error:
            with self.lock:
                self._errors.append(error)
            self._stop.set()

    def _crew_member(self) -> None:
        """Measure batches on one machine until the time is up; ask for another machine where it is lost."""
        losses = 0
        while losses < _LOSSES and not self.over():
            machine = self.kernels.hire()
            self._machines.add(machine)
            try:
                facts = self.kernels.facts(machine)
                while (work := self._next(facts)) is not None:
                    search, batch = work
                    try:
                        self._measure(machine, facts, search, batch)
                    except SkippedError as error:
                        self._skip(search, batch, str(error))
                    except BaseException as error:
                        culprits = self._give_back(search, batch)
                        if not isinstance(error, LostError):
                            raise
                        for candidate in culprits:
                            self._add(facts, search, batch, [crashed(candidate, search, batch, str(error))])
                        if culprits:
                            losses = -1  # the machine is not to blame
                        raise
                    losses = 0
                return
            except LostError as error:
                losses += 1
                with self.lock:
                    self.lost.append(str(error))
                if self.tracker is not None and _servers_left(self.tracker) == 0:
                    return
            finally:
                machine.close()
                self._machines.discard(machine)

    def _next(self, facts: Facts) -> tuple[Search, Batch] | None:
        """A batch of the search that has had the least time; None: nothing is left, or the time is up."""
        while not self.over():
            with self.lock:
                mine = self._searches(facts)
                for search in sorted(mine, key=lambda s: self._spent.get(id(s), 0.0) / s.weight):
                    batch = search.next(BATCH)
                    if batch is not None:
                        self._running += 1
                        return search, batch
                if not self._running:
                    return None
            time.sleep(0.05)  # another machine has the last batches; it may lose them
        return None

    def _searches(self, facts: Facts) -> list[Search]:
        """The searches of a kind of machine, made when the first of the kind appears."""
        if facts.processor not in self.searches:

            def known(isa: str, group: str, sources: str) -> list[Record]:
                key = (facts.processor, isa, group, sources)
                records = self.database.records
                return [r for r in records if (r.processor, r.isa, r.group, r.sources) == key]

            found = self.kernels.searches(facts, known)
            self.searches[facts.processor] = {search.group: search for search in found}
        return list(self.searches[facts.processor].values())

    def _measure(self, machine: Machine, facts: Facts, search: Search, batch: Batch) -> None:
        started = time.monotonic()
        rounds = self.kernels.rounds[batch.confirm]
        self._progress(search)
        if batch.invent:
            self._invent(search, batch)
        outcomes = self.kernels.compare(machine, facts, search, batch, rounds) if batch.candidates else ()
        for found in outcomes:
            self._add(facts, search, batch, found, rounds)
            self._progress(search)
            if self.over():
                break
        with self.lock:
            search.done(batch)
            self._running -= 1
            self._spent[id(search)] = self._spent.get(id(search), 0.0) + time.monotonic() - started

    def _invent(self, search: Search, batch: Batch) -> None:
        try:
            texts = search.invent(batch.invent)
        except InventionError as error:
            texts = []
            with self.lock:
                self.database.notes.append(f"{search.title}: nothing more is invented: {error}")
        with self.lock:
            search.offer(texts)

    def _skip(self, search: Search, batch: Batch, why: str) -> None:
        with self.lock:
            self._running -= 1
            search.lost(batch)
            search.skipped = True
            self.database.notes.append(f"{search.title}: left out of this run: {why}")

    def _give_back(self, search: Search, batch: Batch) -> list[Candidate]:
        with self.lock:
            self._running -= 1
            return search.lost(batch)

    def _add(
        self, facts: Facts, search: Search, batch: Batch, outcomes: Sequence[Outcome], rounds: int = 0
    ) -> None:
        records = [record_of(facts, search, outcome, rounds, batch.confirm) for outcome in outcomes]
        with self.lock:
            self.measured += self.database.add(records)
            for record in records:
                search.add(record)

    def _progress(self, search: Search) -> None:
        left = max(0, round(self.deadline - time.monotonic()))
        with self.lock:
            if time.monotonic() < self._said + _EVERY:
                return
            self._said = time.monotonic()
            now = search.best()
            tried, measured = search.tried, self.measured
        ratio = ""
        if now is not None:
            product = 1.0
            for record in now[1].values():
                product *= record.ratio or 1
            ratio = f", best {product ** (1 / len(now[1])):.3f} of the default"
        clock = f"{left // 60}:{left % 60:02d} left"
        where = f"{search.title} {search.isa}: {tried} of {search.size} tried{ratio}"
        self.say(f"tune {where}; {measured} results, {clock}")


def _servers_left(tracker: Tracker) -> int:
    with suppress(IsofoldError):
        return tracker.servers()
    return 0


def crashed(candidate: Candidate, search: Search, batch: Batch, why: str) -> Outcome:
    """The outcome of a candidate whose machine was lost, on the first of its workloads."""
    return Outcome(candidate, (batch.workloads or search.workloads)[0], why, "crashed")


def record_of(facts: Facts, search: Search, outcome: Outcome, rounds: int, confirmed: bool) -> Record:
    """An outcome as a line of the database."""
    result = outcome.result
    fixed: dict[str, Any] = {
        "processor": facts.processor,
        "isa": search.isa,
        "group": search.group,
        "sources": search.sources,
        "workload": outcome.workload.to_json(),
        "knobs": outcome.candidate,
        "host": facts.host,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "confirmed": confirmed,
        "trace": search.traces.get(outcome.candidate.get(TRACE, -1)),
    }
    if isinstance(result, str):
        return Record(status=outcome.status, note=result[:2000], **fixed)
    times: dict[str, Any] = {
        "seconds": float(f"{result.seconds:.4g}"),
        "baseline": float(f"{result.baseline:.4g}"),
        "ratio": round(result.ratio, 5),
        "noise": round(result.noise, 5),
    }
    return Record(status="ok", **times, **fixed)


def summary(search: Search, processor: str, database: Database) -> list[dict[str, Any]]:
    """A row for every workload of a search: seconds of the default and of what would be chosen, and their ratio."""
    now = search.best()
    seen = {
        r.shape: r
        for r in database.records
        if (r.group, r.isa, r.processor) == (search.group, search.isa, processor) and r.baseline
    }
    rows = []
    for shape, workload in search.shapes.items():
        record = None if now is None else now[1].get(shape)
        base = record or seen.get(shape)
        rows.append(
            {
                "workload": workload.name,
                "group": search.group,
                "isa": search.isa,
                "processor": processor,
                "tried": search.tried,
                "before": None if base is None else base.baseline,
                "after": None if record is None else record.seconds,
                "ratio": None if record is None else record.ratio,
                "noise": None if record is None else record.noise,
                "knobs": None if now is None else changed(now[0], search.default),
                "invented": now is not None and TRACE in now[0],
            }
        )
    return rows


def changed(candidate: Mapping[str, int], default: Mapping[str, int]) -> dict[str, int]:
    """The knobs of a candidate whose value is not the default."""
    return {name: value for name, value in candidate.items() if value != default.get(name)}
