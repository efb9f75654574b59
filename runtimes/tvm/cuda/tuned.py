"""What a compilation takes from the tuning database: the best values of each kernel's knobs for its architectures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ....compiler.errors import InputError
from ...tuning.database import Record, read_records
from ...tuning.selection import best, database_path
from ..schedule_traces import Traced
from ..tune_cpu import schedule_sources
from .knobs import group_of, sources_of
from .spaces import space_of


class TunedValues:
    """Values by kernel, for `knobs.choosing`, and traces; `used` has the groups that got some, `failed` the functions
    whose trace could not be applied. database: None: this user's; a damaged one counts as none.

    A compilation does not know the chip it is for: of several of an architecture the one with the most measurements
    counts. Code for several architectures takes the values of the first that has some, where all of them can run it.
    """

    def __init__(self, archs: Sequence[str], database: Path | None = None) -> None:
        path = database or database_path()
        try:
            records = read_records(path)[0] if path.exists() else []
        except InputError:
            records = []
        self.archs, self.used = archs, set[str]()
        self.failed: dict[str, str] = {}
        self._groups: dict[str, list[Record]] = {}
        for record in records:
            if record.group.startswith("cuda_") and record.isa in archs:
                self._groups.setdefault(record.group, []).append(record)

    def __call__(self, kernel: Any) -> dict[str, int]:
        """The values of one kernel, none where the defaults stay."""
        group = group_of(kernel)
        mine = self._groups.get(group)
        space = space_of(kernel, self.archs) if mine else None
        if mine is None or space is None:
            return {}
        current = [r for r in mine if r.sources == sources_of(kernel)]
        for arch in self.archs:
            found = best(_of_one_chip(r for r in current if r.isa == arch))
            if found is not None and found[0].keys() == space.values.keys() and space.legal(found[0]):
                self.used.add(group)
                return found[0]
        return {}

    def trace(self, group: str) -> Traced | None:
        """MetaSchedule's trace for a function that TVM generates (`generic.group_of`)."""
        current = [r for r in self._groups.get(group, []) if r.sources == schedule_sources()]
        for arch in self.archs:
            found = best(_of_one_chip(r for r in current if r.isa == arch))
            text = None if found is None else next(iter(found[1].values())).trace
            if text is not None:
                self.used.add(group)
                return Traced(text)
        return None


def _of_one_chip(records: Iterable[Record]) -> list[Record]:
    chips: dict[str, list[Record]] = {}
    for record in records:
        chips.setdefault(record.processor, []).append(record)
    return max(chips.values(), key=len, default=[])
