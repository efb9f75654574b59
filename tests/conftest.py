"""Fixtures that all tests share, and what makes a test's result the same alone, in any order and on a busy machine."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from isofold.passes import sparse_rates

ROOT = Path(__file__).resolve().parent.parent

# Examples follow from the test's name: the same in every run. No clock decides whether a property holds.
settings.register_profile(
    "isofold", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("isofold")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    # Tests run side by side, one process for each core (pytest -n auto); commands under test may ask for more.
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """Fixtures of modules and sessions are made before `_deterministic`, by whichever test comes first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)
        torch.set_num_threads(1)
    return (yield)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws when it is imported does not depend on those before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def wide_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse layouts are chosen by the rates of one kind of machine, whatever this one is or was measured to have."""
    monkeypatch.setattr(sparse_rates, "_current", lambda measured, wide: sparse_rates.WIDE)
