"""From measurements to settings: which values of the knobs a build takes on a processor.

For each group of kernels the candidate with the lowest geometric mean of time ratios over all measured workloads (1
where it was not measured) is taken, if it was confirmed, is wrong nowhere, gains more than SIGMAS times the noise, and
makes no workload slower by more than LOSS. Imports neither torch nor TVM: it runs whenever the op library is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from ...compiler.errors import InputError
from ...compiler.processor import cache_folder, processor
from ..kernels.knobs import Settings, sources
from .database import Record, read_records

__all__ = ["best", "chosen", "database_path", "settings_for_build", "shipped_records"]

LOSS = 1.02
"""A workload may become this much slower where others gain more."""
SIGMAS = 3
"""Many candidates are compared, and one in forty beats two standard errors by luck."""
ISAS = ("v3", "v4")
_SHIPPED = Path(__file__).resolve().parents[1] / "kernels" / "tuned.jsonl"


def database_path() -> Path:
    """Where this user's measurements lie."""
    return cache_folder() / "tuning.jsonl"


def best(records: Iterable[Record]) -> tuple[dict[str, int], dict[str, Record]] | None:
    """The candidate to take among records of one group, and its records by workload; None: the defaults stay."""
    by_candidate: dict[str, dict[str, Record]] = {}
    wrong: set[str] = set()
    shapes: set[str] = set()
    for record in records:
        if record.status != "ok":
            wrong.add(record.candidate)
        elif record.confirmed:
            by_candidate.setdefault(record.candidate, {})[record.shape] = record
            shapes.add(record.shape)
    found: tuple[float, dict[str, Record]] | None = None
    for candidate, measured in sorted(by_candidate.items()):
        gain = -sum(math.log(r.ratio or 1) for r in measured.values())
        noise = math.sqrt(sum((r.noise or 0) ** 2 for r in measured.values()))
        worst = max(r.ratio or 1 for r in measured.values())
        if candidate in wrong or gain <= SIGMAS * noise or worst > LOSS:
            continue
        if found is None or gain > found[0]:
            found = gain, measured
    return None if found is None else (next(iter(found[1].values())).knobs, found[1])


def chosen(
    records: Iterable[Record], name: str, isa: str, *, any_sources: bool = False, any_processor: bool = False
) -> Settings:
    """The settings for a processor and an instruction set; the defaults (empty) where nothing was measured."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.isa != isa or not (any_processor or record.processor == name):
            continue
        groups.setdefault(record.group, []).append(record)
    values: dict[str, Mapping[str, int]] = {}
    for group, members in groups.items():
        current = [r for r in members if any_sources or r.sources == _sources(group)]
        found = best(current)
        if found is not None and _known(group, found[0]):
            values[group] = found[0]
    return Settings(values)


def _sources(group: str) -> str | None:
    try:
        return sources(group)
    except ValueError:  # a group of another version
        return None


def _known(group: str, knobs: Mapping[str, int]) -> bool:
    try:
        Settings({group: knobs})
    except ValueError:
        return False
    return True


def shipped_records() -> list[Record]:
    """The committed database."""
    return list(_read(_SHIPPED, _SHIPPED.stat().st_mtime_ns)) if _SHIPPED.exists() else []


def settings_for_build(*, own: bool = True) -> dict[str, Settings]:
    """Settings by instruction set for the op library on this processor.

    For each group this machine's own measurements, else what is shipped for this processor, else what is shipped.
    own: whether to look at this user's database (not for a library that others will run). A damaged one counts as none:
    `isofold tune` says what is wrong with it.
    """
    here = processor()
    shipped = shipped_records()
    mine = _own_records() if own else []
    any_processor = not any(r.processor == here for r in shipped)
    found = {}
    for isa in ISAS:
        values = chosen(shipped, here, isa, any_sources=True, any_processor=any_processor).to_json()
        measured = {
            r.group for r in mine if r.processor == here and r.isa == isa and r.sources == _sources(r.group)
        }
        for group in measured:
            values.pop(group, None)
        values.update(chosen(mine, here, isa).to_json())
        found[isa] = Settings(values)
    return found


def _own_records() -> list[Record]:
    path = database_path()
    try:
        return list(_read(path, path.stat().st_mtime_ns))
    except (OSError, InputError):
        return []


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> tuple[Record, ...]:
    return tuple(read_records(path)[0])
