"""What a compilation takes from the tuning database: the best values of each kernel's knobs for its architectures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ....compiler.errors import InputError
from ...tuning.database import Record, read_records
from ...tuning.selection import best, database_path
from .knobs import Choose, group_of, sources_of
from .spaces import space_of


def tuned_values(archs: Sequence[str], database: Path | None = None) -> Choose:
    """Values by kernel, for `knobs.choosing`. database: None: this user's; a damaged one counts as none.

    A compilation does not know the chip it is for: of several of an architecture the one with the most measurements
    counts. Code for several architectures takes the values of the first that has some, where all of them can run it.
    """
    path = database or database_path()
    try:
        records = read_records(path)[0] if path.exists() else []
    except InputError:
        records = []
    by_group: dict[str, list[Record]] = {}
    for record in records:
        if record.group.startswith("cuda_") and record.isa in archs:
            by_group.setdefault(record.group, []).append(record)

    def choose(kernel: Any) -> dict[str, int]:
        mine = by_group.get(group_of(kernel))
        if not mine:
            return {}
        sources, space = sources_of(kernel), space_of(kernel, archs)
        current = [r for r in mine if r.sources == sources]
        for arch in archs:
            found = best(_of_one_chip(r for r in current if r.isa == arch))
            known = found is not None and space is not None and found[0].keys() == space.values.keys()
            if found is not None and space is not None and known and space.legal(found[0]):
                return found[0]
        return {}

    return choose


def _of_one_chip(records: Iterable[Record]) -> list[Record]:
    chips: dict[str, list[Record]] = {}
    for record in records:
        chips.setdefault(record.processor, []).append(record)
    return max(chips.values(), key=len, default=[])
