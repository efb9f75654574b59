"""What `isofold tune MODEL --target tvm-cpu` does: what TVM generates for the model, then the op library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tuning.selection import database_path
from ..tuning.session import joined, merge_into, tune_subject
from ..tuning.subjects import packed_linears
from .tune_cpu import tune_program

if TYPE_CHECKING:
    from ...compiler.program import Program

__all__ = ["tune_generated"]


def tune_generated(
    program: Program,
    *,
    seconds: float,
    threads: int | None,
    rpc: str | None,
    key: str,
    database: Path | None,
    merge: Sequence[Path],
    isa: str | None,
    progress: Callable[[str], None] | None,
    traces: int,
) -> dict[str, Any]:
    """Half of the time for each, all of it for what TVM generates where the model has no packed linear."""
    path = database or database_path()
    merged, notes = merge_into(path, merge)
    packed = bool(packed_linears(program, 1))
    share = seconds / 2 if packed else seconds
    generated = tune_program(program, share, path, isa, progress, rpc, key, traces)
    generated |= {"merged": merged, "notes": [*notes, *generated["notes"]], "library": None}
    if not packed:
        return generated
    library = tune_subject(
        program,
        seconds=share,
        threads=threads,
        rpc=rpc,
        key=key,
        database=database,
        merge=(),
        isa=isa,
        progress=progress,
    )
    return joined(library, generated)
