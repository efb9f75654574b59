"""The database survives kills at any byte, resumes, merges, and says where it is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from isofold.compiler.errors import InputError
from isofold.runtimes.tuning.database import Database, read_records

from ...processes import ended, wait_until
from .conftest import record


def test_what_is_added_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "db.jsonl"
    database = Database(path)
    records = [record(), record(confirmed=False), record(status="wrong", note="2 outputs differ", ratio=None)]
    assert database.add(records) == 3
    assert database.add(records) == 0
    assert Database(path).records == records
    assert records[0] in Database(path)
    assert all(json.loads(line)["v"] == 1 for line in path.read_text().splitlines())


def test_every_cut_of_the_last_line_loses_only_that_line(tmp_path: Path) -> None:
    path = tmp_path / "db.jsonl"
    Database(path).add([record(), record(host="there", isa="v3")])
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    for cut in (end + 1, end + 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        database = Database(path)
        assert database.records == [record()]
        assert "last line was cut off and is ignored" in database.notes[0]
        assert database.add([record(isa="v3")]) == 1
        assert read_records(path) == ([record(), record(isa="v3")], None)
    path.write_bytes(whole[: end - 5])
    assert Database(path).records == []
    Database(path).add([record()])
    assert read_records(path) == ([record()], None)


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("not json", "Expecting value"),
        ('{"v":1}', "missing:"),
        ('{"v":"new"}', '{"v":"new"}'),
        ("[]", "[]"),
        (record().line().decode().strip().replace('"ok"', '"fine"'), "status: 'fine'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, got: str) -> None:
    path = tmp_path / "db.jsonl"
    content = record().line().decode() + line + "\n" + record(isa="v3").line().decode()
    path.write_text(content)
    with pytest.raises(InputError) as error:
        Database(path)
    assert "The tuning database is damaged" in str(error.value)
    assert f"{path}, line 2" in str(error.value)
    assert got in str(error.value)
    assert "move the file away" in str(error.value)
    assert path.read_text() == content


def test_a_database_of_a_later_isofold_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "db.jsonl"
    path.write_text('{"v":7,"chip":"new"}\n')
    with pytest.raises(InputError, match="another version of isofold") as error:
        Database(path)
    assert "version 7" in str(error.value)
    assert "--database" in str(error.value)
    assert path.read_text() == '{"v":7,"chip":"new"}\n'


def test_merging_takes_what_is_new(tmp_path: Path) -> None:
    ours, theirs = Database(tmp_path / "a.jsonl"), Database(tmp_path / "b.jsonl")
    ours.add([record()])
    theirs.add([record(date="2026-01-01T00:00:00+00:00"), record(processor="Other (3/4)")])
    assert ours.merge(theirs.path) == 1
    assert ours.merge(theirs.path) == 0
    assert [r.processor for r in Database(ours.path).records] == ["Some CPU (1/2)", "Other (3/4)"]
    with pytest.raises(InputError, match="cannot be read"):
        ours.merge(tmp_path / "nowhere.jsonl")


def test_a_place_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(InputError, match=r"cannot be written[\s\S]*--database"):
        Database(Path("/proc/nowhere/db.jsonl")).add([record()])


def lines(path: Path, writer: str) -> int:
    """So many a writer has written, whole or not."""
    return path.read_bytes().count(f'"sources":"{writer} '.encode()) if path.exists() else 0


def test_two_writers_killed_at_any_moment_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "db.jsonl"
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from dataclasses import replace
from isofold.runtimes.tuning.database import Database, Record
one = Record("p", "v4", "g", "s", {{"m": 1}}, {{"k": 1}}, "ok", "h", "d")
database = Database(Path({str(path)!r}))
for i in range(1000000):
    database.add([replace(one, sources=f"{{sys.argv[1]}} {{i}}", note="x" * (i % 3000))])
"""
    for turn in range(2):
        commands = [[sys.executable, "-c", code, f"{name}{turn}"] for name in "ab"]
        with ExitStack() as stack:
            writers = [stack.enter_context(ended(subprocess.Popen(command))) for command in commands]
            wait_until(lambda: min(lines(path, f"{name}{turn}") for name in "ab") > 10, *writers)  # noqa: B023
            for writer in writers:
                os.kill(writer.pid, signal.SIGKILL)
    records, _ = read_records(path)
    assert {r.sources.split()[0] for r in records} == {"a0", "b0", "a1", "b1"}
