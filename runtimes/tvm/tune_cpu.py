"""Tuning of what TVM generates: the shapes of default schedules (`schedule_rules.Shape`), measured for each function.

A function's key is its structural hash, so equal kernels of two models share what was measured. Candidates are
neighbours of the default tile sizes; each is compiled and run in a process of its own (`tune_worker`), must give the
default's results within rounding, and is timed in turns with two copies of the default. What looks better is measured
again with six times the rounds, and only that lets it be chosen (`runtimes/tuning/selection.py`). Records go to the
same database as those of the op library's kernels, one line each, so that a kill loses nothing, and a second run goes
on where the first one ended.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from platform import node
from typing import TYPE_CHECKING, Any

import tvm
from tvm import IRModule
from tvm.tirx import PrimFunc

from ...compiler.errors import InputError
from ...compiler.processor import processor
from ..tuning.child import Child, LostError
from ..tuning.database import Database, Record, read_records
from ..tuning.machines import Comparison, compared
from ..tuning.selection import best, database_path
from .schedule_cpu import function_key, schedulable, schedule_function
from .schedule_rules import Shape

if TYPE_CHECKING:
    from ...compiler.program import Program

Progress = Callable[[str], None]

ROUNDS, AGAIN = 20, 6
PROMISING = 0.97
TIMEOUT = 120.0
SIZE = 128
"""What an unknown size is measured with."""


@dataclass(frozen=True)
class Tuned:
    """What tuning did to one function: seconds of the default and of what is taken (the same if it is)."""

    name: str
    key: str
    shape: Shape
    before: float | None
    after: float | None
    candidates: int
    ratio: float | None = None
    noise: float | None = None
    changes: dict[str, int] | None = None


def tune_functions(
    mod: IRModule,
    target: Any,
    seconds: float,
    database: Path,
    rpc: str | None = None,
    progress: Progress | None = None,
    sizes: Mapping[str, int] | None = None,
) -> list[Tuned]:
    """Measure other shapes for the functions of a module (before `schedule_cpu`), the largest share of time first.

    sizes: values of symbolic sizes by name. Raises InputError: an unreadable database, or `rpc`, which only the
    op library's kernels can be measured over.
    """
    if rpc is not None:
        raise InputError(
            "Generated kernels are tuned on this machine only",
            got=f"rpc={rpc!r}",
            hint="run the tuning there and merge its database (isofold tune --merge)",
        )
    say = progress or (lambda _: None)
    records = Database(database)
    deadline = time.monotonic() + seconds
    found: list[Tuned] = []
    functions: dict[str, tuple[str, PrimFunc]] = {}
    for variable, function in mod.functions.items():
        if schedulable(function):
            functions.setdefault(function_key(function), (str(variable.name_hint), function))
    for done, (key, (name, function)) in enumerate(functions.items(), 1):
        said = []
        left = (deadline - time.monotonic()) / (len(functions) - done + 1)
        until = time.monotonic() + left
        for text in _search(function, key, target, records, until, sizes or {}):
            said.append(text)
            say(f"{name} ({done}/{len(functions)}): {text}")
        found.append(_summary(name, key, target, records, len(said)))
    return found


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
) -> list[dict[str, Any]]:
    """`tune_functions` for the kernels that TVM makes for a program; rows as `isofold.tune` has them."""
    from .compile_cpu import cpu_target, fused
    from .lower import lower

    target = cpu_target("llvm" if isa is None else f"llvm:x86-64-{isa}")
    module = fused(lower(program).module, target)
    path = database or database_path()
    rows = []
    for tuned in tune_functions(module, target, seconds, path, progress=progress):
        changed = tuned.shape != Shape.of(target)
        rows.append(
            {
                "workload": tuned.name,
                "group": tuned.key,
                "isa": isa_of(target),
                "processor": processor(),
                "tried": tuned.candidates,
                "before": tuned.before,
                "after": tuned.after,
                "ratio": tuned.ratio,
                "noise": tuned.noise,
                "knobs": tuned.changes if changed else None,
            }
        )
    return rows


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


def candidates(function: PrimFunc, target: Any) -> Iterator[dict[str, int]]:
    """Other shapes for a function, as changes of the default; none where its rules depend on none."""
    default = Shape.of(target)
    said = str(schedule_function(function, target).attrs["isofold.schedule"])
    tiles = "rows of them at once" in said
    grid: dict[str, tuple[int, ...]] = {}
    if tiles:
        grid["rows"] = (1, 2, 4, 6, 8, 12) if default.lanes == 16 else (2, 4, 6)
    if "contraction" in said:
        grid["columns"] = tuple(default.lanes * n for n in (1, 2, 3, 4))
    if "row" in said and not tiles:
        grid["chains"] = (1, 2, 4)
    values = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    near = {name: (options, options.index(getattr(default, name))) for name, options in grid.items()}

    def distance(one: dict[str, int]) -> int:
        return sum(abs(near[name][0].index(value) - near[name][1]) for name, value in one.items())

    yield from (one for one in sorted(values, key=distance) if distance(one) > 0)


def _search(
    function: PrimFunc, key: str, target: Any, records: Database, until: float, sizes: Mapping[str, int]
) -> Iterator[str]:
    child: Child | None = None
    try:
        for change in candidates(function, target):
            for rounds, confirmed in ((ROUNDS, False), (ROUNDS * AGAIN, True)):
                empty = _record(key, target, change, confirmed, sizes)
                if empty in records:
                    known = next(r for r in records.records if r.key == empty.key)
                    if (known.ratio or 1) > PROMISING:
                        break
                    continue
                if time.monotonic() > until:
                    return
                try:
                    child = child or Child("isofold.runtimes.tvm.tune_worker")
                    measured = _ask(child, function, target, change, rounds, sizes)
                except LostError as error:
                    child, measured = None, str(error)
                record = _filled(empty, measured, rounds)
                records.add([record])
                yield f"{change}: {record.note or f'{record.ratio:.2f} of the time'}"
                if (record.ratio or 1) > PROMISING:
                    break
    finally:
        if child is not None:
            child.close()


def _ask(
    child: Child,
    function: PrimFunc,
    target: Any,
    change: dict[str, int],
    rounds: int,
    sizes: Mapping[str, int],
) -> Comparison | str:
    question = {
        "function": tvm.ir.save_json(function),
        "target": tvm.ir.save_json(target),
        "change": change,
        "rounds": rounds,
        "sizes": dict(sizes),
        "size": SIZE,
    }
    answer = child.ask(question, TIMEOUT)
    if "error" in answer:
        return str(answer["error"])
    return compared(answer)[0]


def _record(
    key: str, target: Any, change: dict[str, int], confirmed: bool, sizes: Mapping[str, int]
) -> Record:
    return Record(
        processor=processor(),
        isa=isa_of(target),
        group=key,
        sources=schedule_sources(),
        workload={"sizes": dict(sizes), "size": SIZE},
        knobs=change,
        status="ok",
        host=node(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        confirmed=confirmed,
    )


def _filled(record: Record, measured: Comparison | str, rounds: int) -> Record:
    if isinstance(measured, str):
        status = "wrong" if measured.startswith("wrong") else "crashed"
        return replace(record, status=status, note=measured[:500])
    values = asdict(measured)
    return replace(
        record, rounds=rounds, **{name: values[name] for name in ("seconds", "baseline", "ratio", "noise")}
    )


def _summary(name: str, key: str, target: Any, records: Database, tried: int) -> Tuned:
    mine = [r for r in records.records if r.group == key and _is_current(r, target)]
    better = best(mine)
    baseline = next((r.baseline for r in reversed(mine) if r.baseline), None)
    if better is None:
        return Tuned(name, key, Shape.of(target), baseline, baseline, tried)
    record = next(iter(better[1].values()))
    shape = replace(Shape.of(target), **better[0])
    times = (record.baseline, record.seconds, tried, record.ratio, record.noise)
    return Tuned(name, key, shape, *times, better[0])
