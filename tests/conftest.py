"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# Tests run side by side, one process for each core (pytest -n auto).
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT
