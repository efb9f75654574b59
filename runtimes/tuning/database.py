"""The tuning database: one JSON object a line, only ever appended to.

A line is what one candidate did on one workload. It is written with one call and synced, under a lock, so that a kill
at any moment loses at most the line being written; a cut last line is ignored (and cut off by the next writer). The
key is processor, instruction set, hash of the group's sources, group, workload and values of the knobs: what has a
line is not measured again, and a change of the kernels' sources makes old lines silent. Imports neither torch nor TVM.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...compiler.errors import InputError

__all__ = ["Database", "Record", "read_records"]

VERSION = 1
STATUSES = ("ok", "wrong", "crashed", "failed")


@dataclass(frozen=True)
class Record:
    """One candidate on one workload.

    Attributes:
        processor, host: where; isa: `v3` or `v4`; group: kernels; sources: hash of theirs (`knobs.sources`).
        workload, knobs: plain data of Workload and of the group's values.
        status: `ok`; `wrong` (outputs differ), `crashed` (it took its process with it), `failed` (did not compile).
        seconds: of a layer, lower quartile; baseline: that of the defaults in the same rounds; ratio: of the two.
        noise: the ratio's standard deviation by bootstrap over the rounds, at least what the defaults differ from
            themselves.
        rounds: how many; confirmed: measured again after it had looked best, which alone lets it be chosen.
        date: UTC, ISO 8601; note: what went wrong.
        trace: the schedule that the knob `trace` stands for, as text (`tvm/schedule_traces.py`).
    """

    processor: str
    isa: str
    group: str
    sources: str
    workload: dict[str, Any]
    knobs: dict[str, int]
    status: str
    host: str
    date: str
    seconds: float | None = None
    baseline: float | None = None
    ratio: float | None = None
    noise: float | None = None
    rounds: int = 0
    confirmed: bool = False
    note: str | None = None
    trace: str | None = None

    @property
    def candidate(self) -> str:
        """The values of the knobs as a key."""
        return json.dumps(self.knobs, sort_keys=True)

    @property
    def shape(self) -> str:
        """The workload as a key."""
        return json.dumps(self.workload, sort_keys=True)

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured, and how well."""
        return (
            self.processor,
            self.isa,
            self.group,
            self.sources,
            self.shape,
            self.candidate,
            self.confirmed,
        )

    def line(self) -> bytes:
        """The line of the database, with its end."""
        values = {"v": VERSION, **{k: v for k, v in asdict(self).items() if v is not None}}
        return json.dumps(values, separators=(",", ":")).encode() + b"\n"


_FIELDS = {f.name for f in fields(Record)}
_NEEDED = {"processor", "isa", "group", "sources", "workload", "knobs", "status", "host", "date"}


def read_records(path: Path) -> tuple[list[Record], str | None]:
    """All lines, and a note where the last one was cut off.

    Raises:
        InputError: the file cannot be read, or has a line that is no record (other than a cut last one).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError("The tuning database cannot be read", where=str(path), got=str(error)) from None
    whole, _, rest = content.rpartition(b"\n")
    records = [
        _record(line, path, number) for number, line in enumerate(whole.splitlines(), 1) if line.strip()
    ]
    note = f"{path}: the last line was cut off and is ignored ({len(rest)} bytes)" if rest else None
    return records, note


def _record(line: bytes, path: Path, number: int) -> Record:
    expected = f"one JSON object of a measurement, version {VERSION}"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise _damaged(path, number, expected, f"{error}: {line[:60]!r}") from None
    version = values.pop("v", None) if isinstance(values, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise InputError(
            "The tuning database is of another version of isofold",
            where=f"{path}, line {number}",
            expected=f"records of version {VERSION}",
            got=f"version {version}",
            hint="name another file with --database; this one is left as it is",
        )
    if version != VERSION:
        raise _damaged(path, number, expected, f"{line[:60]!r}")
    missing, unknown = _NEEDED - values.keys(), values.keys() - _FIELDS
    well_typed = isinstance(values.get("workload"), dict) and isinstance(values.get("knobs"), dict)
    if missing or unknown or not well_typed or values["status"] not in STATUSES:
        problem = f"missing: {sorted(missing)}, unknown: {sorted(unknown)}, status: {values.get('status')!r}"
        raise _damaged(path, number, expected, problem)
    return Record(**values)


def _damaged(path: Path, number: int, expected: str, got: str) -> InputError:
    hint = "remove that line, or move the file away and tune again; nothing was changed"
    return InputError(
        "The tuning database is damaged",
        where=f"{path}, line {number}",
        expected=expected,
        got=got,
        hint=hint,
    )


class Database:
    """The records of a file, and appending to it. The file need not exist; `notes` says what was odd in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.records: list[Record] = []
        if path.exists():
            self.records, note = read_records(path)
            self.notes += [note] if note else []
        self._keys = {record.key for record in self.records}

    def __contains__(self, record: Record) -> bool:
        return record.key in self._keys

    def add(self, records: Iterable[Record]) -> int:
        """Append those that are not there yet; returns how many were new. Raises InputError where it cannot write."""
        new = [r for r in records if r.key not in self._keys]
        if not new:
            return 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _cut_tail(file.fileno())
                os.write(file.fileno(), b"".join(r.line() for r in new))
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                "The tuning database cannot be written",
                where=str(self.path),
                got=str(error),
                hint="name another file with --database, or set ISOFOLD_CACHE to a writable folder",
            ) from None
        self.records += new
        self._keys |= {r.key for r in new}
        return len(new)

    def merge(self, other: Path) -> int:
        """Append what another database has and this one has not. Raises InputError where the other is unreadable."""
        records, note = read_records(other)
        self.notes += [note] if note else []
        return self.add(records)


def _cut_tail(descriptor: int) -> None:
    """Remove an unfinished last line, so that the next one starts where a line starts."""
    size = os.fstat(descriptor).st_size
    end = size
    for start in _steps_back(size):
        block = os.pread(descriptor, end - start, start)
        found = block.rfind(b"\n")
        if found >= 0:
            if start + found + 1 < size:
                os.ftruncate(descriptor, start + found + 1)
            return
        end = start
    if size:
        os.ftruncate(descriptor, 0)


def _steps_back(size: int, step: int = 65536) -> Iterator[int]:
    yield from range(size - step, 0, -step)
    if size:
        yield 0
