"""What `isofold tune` asks of the backend: merge databases, find the workloads, tune, and build with the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.processor import processor
from ..onnx.oplib.build import build
from .database import Database
from .selection import database_path
from .tune import tune

if TYPE_CHECKING:
    from ...compiler.program import Program

__all__ = ["joined", "merge_into", "tune_subject"]


def merge_into(path: Path, merge: Sequence[Path]) -> tuple[int, list[str]]:
    """Take over what other databases have: how many records were new, and what was odd. Raises InputError."""
    if not merge:
        return 0, []
    known = Database(path)
    return sum(known.merge(other) for other in merge), known.notes


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The result of two runs on the same database, one after the other."""
    both = {**other, **one}
    for name in ("seconds", "measured", "merged"):
        both[name] = one.get(name, 0) + other.get(name, 0)
    for name in ("lost", "workloads"):
        both[name] = [*one.get(name, ()), *other.get(name, ())]
    for name in ("processors", "notes"):
        both[name] = list(dict.fromkeys([*one.get(name, ()), *other.get(name, ())]))
    return both


def tune_subject(
    subject: Program | Path | None,
    *,
    seconds: float,
    threads: int | None,
    rpc: str | None,
    key: str,
    database: Path | None,
    merge: Sequence[Path],
    isa: str | None,
    progress: Callable[[str], None] | None,
) -> dict[str, Any]:
    """See `OnnxBackend.tune`. The op library is built with what was found, where this processor was measured."""
    from .subjects import workloads_of_artefact, workloads_of_program

    say = progress or (lambda _: None)
    path = database or database_path()
    merged, notes = merge_into(path, merge)
    count = threads or len(os.sched_getaffinity(0))
    result: dict[str, Any] = {
        "database": str(path),
        "processors": [],
        "seconds": 0.0,
        "measured": 0,
        "lost": [],
    }
    result |= {"notes": [], "workloads": []}
    if seconds > 0:
        if subject is None:
            workloads = None
        elif isinstance(subject, Path):
            say("read the artefact's linears")
            workloads = workloads_of_artefact(subject, count)
        else:
            workloads = workloads_of_program(subject, count)
        result = tune(
            workloads, seconds=seconds, threads=count, rpc=rpc, key=key, database=path, isa=isa, say=say
        )
    result["merged"] = merged
    result["notes"] = list(dict.fromkeys([*notes, *result["notes"]]))
    result["library"] = None
    if path == database_path() and (merged or processor() in result["processors"]):
        say("build the op library with the best values")
        result["library"] = str(build(progress=lambda what, done, total: say(f"{what} ({done}/{total})")))
    return result
