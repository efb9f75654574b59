"""The benchmarks of channel spaces, which tests share: random folds, spellings, the table of docs/spaces.md."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def spaces_benchmark(root: Path) -> ModuleType:
    """benchmarks/spaces.py as a module."""
    folder = str(root / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("spaces")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="session")
def spellings(spaces_benchmark: ModuleType) -> ModuleType:
    """benchmarks/spellings.py, which spaces.py imports."""
    return sys.modules["spellings"]
