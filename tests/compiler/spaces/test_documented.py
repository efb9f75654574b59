"""The table of docs/spaces.md is what the analysis finds today."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.spaces.analysis import analyse
from isofold.models import registry

from ...captured import captured


def documented(root: Path, benchmark: ModuleType) -> dict[str, list[str]]:
    """The cells of each row, by model."""
    table = (root / "docs" / "spaces.md").read_text().split(benchmark.BEGIN)[1].split(benchmark.END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "resnet"])
def test_the_table_is_current(name: str, root: Path, spaces_benchmark: ModuleType) -> None:
    program = canonicalize(captured(name)[1]).program
    ready, gains, total = spaces_benchmark.prepared(spaces_benchmark.widened(program))
    spaces = analyse(ready)
    scales, shifts = len(spaces.scales.free_roots()), len(spaces.shifts.free_roots())
    found = [spaces_benchmark.description(spaces), f"{gains}/{total}", str(scales), str(shifts)]
    row = documented(root, spaces_benchmark)[name]
    again = "run: python benchmarks/spaces.py --docs docs/spaces.md"
    assert row[:4] == found, again
    assert row[5] == spaces_benchmark.forbids(spaces), again


def test_the_table_has_every_model(root: Path, spaces_benchmark: ModuleType) -> None:
    rows = documented(root, spaces_benchmark)
    assert list(rows) == registry.names()
    assert all(float(row[4]) <= 1e-9 for row in rows.values())
