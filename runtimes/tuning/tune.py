"""Tuning: machines take batches of candidates from the searches, and every result goes to the database at once."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...compiler.errors import InputError, IsofoldError
from .candidates import Builder, forget_old_objects, hashed_sources
from .child import LostError
from .database import Database, Record
from .machines import Comparison, Facts, Machine, Tracker
from .search import Batch, Search
from .selection import database_path
from .workloads import Workload, default_workloads, groups_of, reduced

__all__ = ["tune"]

Say = Callable[[str], None]

BATCH = 4
ROUNDS, CONFIRMING_ROUNDS = 31, 201
_EVERY = 5.0
"""Seconds between two words on the progress."""
_LOSSES = 3
"""So many machines in a row may be lost before one that answers none is given up."""


@dataclass
class _State:
    """What the threads of the machines share, under `lock`."""

    database: Database
    workloads: list[Workload]
    deadline: float
    say: Say
    seed: int
    values: Mapping[str, Sequence[int]]
    isa: str | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    searches: dict[tuple[str, str, str], Search] = field(default_factory=dict)
    spent: dict[tuple[str, str, str], float] = field(default_factory=dict)
    measured: int = 0
    running: int = 0
    lost: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    machines: set[Machine] = field(default_factory=set)
    said: float = 0.0

    def over(self) -> bool:
        """The time is up, or someone has stopped it."""
        return self.stop.is_set() or time.monotonic() >= self.deadline


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
        {database, processors, seconds, measured, lost, notes, workloads: [{workload, group, isa, processor, before,
        after, ratio, noise, knobs}]}; before and after in seconds, after None where nothing better was found.

    Raises:
        InputError: a workload, address or database that cannot be used, or all machines were lost.
        ToolchainError: g++ or TVM is missing.
    """
    say = say or (lambda _: None)
    started = time.monotonic()
    found = Database(database or database_path())
    tracker = None if rpc is None else Tracker.at(rpc, key)
    chosen = list(workloads or default_workloads(threads or len(os.sched_getaffinity(0))))
    forget_old_objects()
    state = _State(found, chosen, started + seconds, say, seed, values or {}, isa)
    scratch = Path(tempfile.mkdtemp(prefix="isofold-tuning-"))
    crew: list[threading.Thread] = []
    try:
        # Compiling while another machine measures costs nothing; here it would disturb.
        with Builder(scratch, workers=len(os.sched_getaffinity(0))) as builder:
            say("tune: compile the harness")
            builder.any_library()
            for _ in range(1 if tracker is None else tracker.servers()):
                thread = threading.Thread(target=_guarded, args=(state, builder, tracker), daemon=True)
                crew.append(thread)
                thread.start()
            try:
                _wait(state, crew)
            finally:
                state.stop.set()
                for machine in list(state.machines):
                    machine.close()  # after Ctrl-C: what they are measuring is not waited for
                for thread in crew:
                    thread.join(timeout=30)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _raise_first(state)
    if not state.searches and not state.measured:
        found.notes.append(
            f"{seconds:.0f} s are too short to compile the first candidates; what was compiled is kept"
        )
    return {
        "database": str(found.path),
        "processors": sorted({name for name, _, _ in state.searches}),
        "seconds": time.monotonic() - started,
        "measured": state.measured,
        "lost": state.lost,
        "notes": found.notes,
        "workloads": _summary(state),
    }


def _wait(state: _State, crew: Sequence[threading.Thread]) -> None:
    """Until all work is done, or the time is up and no machine has work: some may still wait in a tracker's queue."""
    for thread in crew:
        while thread.is_alive() and not (state.over() and not state.running):
            thread.join(timeout=0.2)  # a join without limit would not see Ctrl-C


def _raise_first(state: _State) -> None:
    for error in state.errors:
        raise error
    if state.lost and not state.searches:
        raise InputError(
            "No machine could be used for tuning",
            got="; ".join(dict.fromkeys(state.lost)),
            hint="what was measured before is kept; look at the servers' own output",
        )


def _guarded(state: _State, builder: Builder, tracker: Tracker | None) -> None:
    try:
        _crew_member(state, builder, tracker)
    except BaseException as error:
        with state.lock:
            state.errors.append(error)
        state.stop.set()


def _crew_member(state: _State, builder: Builder, tracker: Tracker | None) -> None:
    """Measure batches on one machine until the time is up; ask for another machine where it is lost."""
    losses = 0
    while losses < _LOSSES and not state.over():
        machine = Machine(tracker)
        state.machines.add(machine)
        try:
            facts = machine.facts(builder.any_library())
            while (batch := _next(state, facts)) is not None:
                search, work = batch
                try:
                    _measure(state, builder, machine, facts, search, work)
                except BaseException as error:
                    culprits = _give_back(state, search, work)
                    if not isinstance(error, LostError):
                        raise
                    for candidate in culprits:
                        _record_all(state, facts, search, work, candidate, "crashed", str(error))
                    raise
                losses = 0
            return
        except LostError as error:
            losses += 1
            with state.lock:
                state.lost.append(str(error))
            if tracker is not None and _servers_left(tracker) == 0:
                return
        finally:
            machine.close()
            state.machines.discard(machine)


def _servers_left(tracker: Tracker) -> int:
    try:
        return tracker.servers()
    except IsofoldError:
        return 0


def _next(state: _State, facts: Facts) -> tuple[Search, Batch] | None:
    """A batch of the search that has had the least time; None: nothing is left, or the time is up."""
    while not state.over():
        with state.lock:
            mine = _searches(state, facts)
            for key in sorted(mine, key=lambda k: state.spent.get(k, 0.0)):
                batch = state.searches[key].next(BATCH)
                if batch is not None:
                    state.running += 1
                    return state.searches[key], batch
            if not state.running:
                return None
        time.sleep(0.05)  # another machine has the last batches; it may lose them
    return None


def _searches(state: _State, facts: Facts) -> list[tuple[str, str, str]]:
    """The searches of a kind of machine, made when the first of the kind appears."""
    isa = state.isa or facts.isa
    if isa > facts.isa:
        raise InputError(
            f"This processor has no {isa}", where=facts.host, got=f"{facts.processor} with {facts.isa}"
        )
    keys = []
    groups: dict[str, list[Workload]] = {}
    for workload in reduced(state.workloads, isa):
        for group in groups_of(workload, isa):
            groups.setdefault(group, []).append(workload)
    for group, members in groups.items():
        key = (facts.processor, isa, group)
        keys.append(key)
        if key not in state.searches:
            hashed = hashed_sources(group)
            known = [
                r
                for r in state.database.records
                if (r.processor, r.isa, r.group, r.sources) == (*key, hashed)
            ]
            state.searches[key] = Search(
                isa, group, members, known, seed=state.seed, values=dict(state.values)
            )
    return keys


def _measure(
    state: _State, builder: Builder, machine: Machine, facts: Facts, search: Search, batch: Batch
) -> None:
    """Build a batch, compare it on every workload and record each result as it comes."""
    started = time.monotonic()
    needed = batch.workloads or search.workloads
    made = builder.libraries(batch.isa, batch.group, needed, [search.default, *batch.candidates])
    default = made[0]
    if isinstance(default, str):
        raise InputError("The kernels with their defaults do not compile", got=default)
    twin = default.with_name(f"{default.stem}-twin.so")
    shutil.copyfile(default, twin)
    good: dict[int, Path] = {}
    for i, library in enumerate(made[1:]):
        if isinstance(library, str):
            _record_all(state, facts, search, batch, batch.candidates[i], "failed", library)
        else:
            good[i] = library
    rounds = CONFIRMING_ROUNDS if batch.confirm else ROUNDS
    for workload in batch.workloads if good else ():
        if state.over():
            break
        _say(state, search)
        results = machine.compare(
            [default, twin, *good.values()], workload, facts, batch.isa, rounds, search.exact
        )
        records = [
            _record(facts, search, batch.candidates[i], workload, result, rounds, batch.confirm)
            for i, result in zip(good, results, strict=True)
        ]
        _add(state, search, records)
        for i, result in list(zip(good, results, strict=True)):
            if isinstance(result, str):
                del good[i]
    for path in (default, twin, *good.values()):
        path.unlink(missing_ok=True)
    with state.lock:
        search.done(batch)
        state.running -= 1
        key = (facts.processor, batch.isa, batch.group)
        state.spent[key] = state.spent.get(key, 0.0) + time.monotonic() - started


def _give_back(state: _State, search: Search, batch: Batch) -> list[dict[str, int]]:
    with state.lock:
        state.running -= 1
        return search.lost(batch)


def _add(state: _State, search: Search, records: Sequence[Record]) -> None:
    with state.lock:
        state.measured += state.database.add(records)
        for record in records:
            search.add(record)


def _record_all(
    state: _State,
    facts: Facts,
    search: Search,
    batch: Batch,
    candidate: dict[str, int],
    status: str,
    note: str,
) -> None:
    """A candidate that is bad on all workloads."""
    workload = (batch.workloads or search.workloads)[0]
    record = _record(facts, search, candidate, workload, note, 0, batch.confirm)
    _add(state, search, [Record(**{**record.__dict__, "status": status})])


def _record(
    facts: Facts,
    search: Search,
    candidate: dict[str, int],
    workload: Workload,
    result: Comparison | str,
    rounds: int,
    confirmed: bool,
) -> Record:
    fixed: dict[str, Any] = {
        "processor": facts.processor,
        "isa": search.isa,
        "group": search.group,
        "sources": hashed_sources(search.group),
        "workload": workload.to_json(),
        "knobs": candidate,
        "host": facts.host,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "confirmed": confirmed,
    }
    if isinstance(result, str):
        return Record(status="wrong", note=result[:2000], **fixed)
    times: dict[str, Any] = {
        "seconds": float(f"{result.seconds:.4g}"),
        "baseline": float(f"{result.baseline:.4g}"),
        "ratio": round(result.ratio, 5),
        "noise": round(result.noise, 5),
    }
    return Record(status="ok", **times, **fixed)


def _say(state: _State, search: Search) -> None:
    left = max(0, round(state.deadline - time.monotonic()))
    with state.lock:
        if time.monotonic() < state.said + _EVERY:
            return
        state.said = time.monotonic()
        now = search.best()
        tried, measured = search.tried, state.measured
    ratio = ""
    if now is not None:
        product = 1.0
        for record in now[1].values():
            product *= record.ratio or 1
        ratio = f", best {product ** (1 / len(now[1])):.3f} of the default"
    clock = f"{left // 60}:{left % 60:02d} left"
    state.say(
        f"tune {search.group} {search.isa}: {tried} of {search.size} tried{ratio}; {measured} results, {clock}"
    )


def _summary(state: _State) -> list[dict[str, Any]]:
    rows = []
    for (name, isa, group), search in state.searches.items():
        now = search.best()
        seen = {
            r.shape: r for r in state.database.records if r.group == group and r.isa == isa and r.baseline
        }
        for workload in search.workloads:
            shape = next((s for s, w in search.shapes.items() if w == workload), "")
            record = None if now is None else now[1].get(shape)
            base = record or seen.get(shape)
            rows.append(
                {
                    "workload": workload.name,
                    "group": group,
                    "isa": isa,
                    "processor": name,
                    "tried": search.tried,
                    "before": None if base is None else base.baseline,
                    "after": None if record is None else record.seconds,
                    "ratio": None if record is None else record.ratio,
                    "noise": None if record is None else record.noise,
                    "knobs": None if now is None else _changed(now[0], search.default),
                }
            )
    return rows


def _changed(candidate: Mapping[str, int], default: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in candidate.items() if value != default[name]}
