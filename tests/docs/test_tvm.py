"""The code in docs/tvm.md runs on an artefact, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import isofold
from isofold.compiler.errors import ToolchainError
from isofold.models import registry
from isofold.runtimes.tvm.library import host_objects


def test_the_python_example(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        host_objects()
    except ToolchainError as error:
        pytest.skip(f"the op library cannot be built here: {error}")
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/tvm.md").read_text(), re.S)
    assert len(code.splitlines()) == 5
    case = registry.get("bert")
    monkeypatch.chdir(tmp_path)
    isofold.compile(
        case.module, case.args, target="tvm-cpu", recipe="float32", output="folder", measure=False
    )
    found: dict[str, object] = {}
    exec(code, found)
    results = found["results"]
    assert isinstance(results, dict)
    assert [array.shape for array in results.values()] == [tuple(case.module(*case.args).shape)]


def test_the_page_names_files_that_exist(root: Path) -> None:
    page = (root / "docs/tvm.md").read_text()
    for path in re.findall(r"`((?:runtimes|examples)/[\w/.]+)`", page):
        assert (root / path).exists(), path
