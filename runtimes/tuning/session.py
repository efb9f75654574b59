"""What `isofold tune` asks of the backend: merge databases, find the workloads, tune, and build with the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.processor import processor
from ..onnx.oplib.build import build
from .database import Database
from .selection import database_path
from .tune import tune

if TYPE_CHECKING:
    from ...compiler.program import Program

__all__ = ["tune_subject"]


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
    merged, notes = 0, []
    if merge:
        known = Database(path)
        merged = sum(known.merge(other) for other in merge)
        notes = known.notes
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
