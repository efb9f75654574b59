"""A cache folder that all tests of a process share, so that kernels are compiled once, and records to play with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isofold.runtimes.kernels.knobs import sources
from isofold.runtimes.tuning.database import Record
from isofold.runtimes.tuning.workloads import Workload

SMALL = Workload("linear", 4, 32, 256, 96, 1, cold=False)
"""A workload of a few microseconds."""
FEW = {
    "stream_near": (2048,),
    "stream_far": (16384,),
    "stream_far_level": (2,),
    "scales_ahead": (0,),
    "gemv_panels": (1, 2),
}
"""Knobs of which only one moves, between two values."""


COMMON_CACHE = os.environ.get("ISOFOLD_CACHE")
"""The cache folder of all other tests, which has the op library; None: this user's."""


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for compiled objects."""
    return tmp_path_factory.mktemp("tuning-cache")


@pytest.fixture(autouse=True)
def _own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ISOFOLD_CACHE", str(shared_cache))
    yield
    (shared_cache / "tuning.jsonl").unlink(missing_ok=True)


@pytest.fixture
def common_cache(_own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder of all other tests again."""
    if COMMON_CACHE is None:
        monkeypatch.delenv("ISOFOLD_CACHE")
    else:
        monkeypatch.setenv("ISOFOLD_CACHE", COMMON_CACHE)


def record(**changes: Any) -> Record:
    """A confirmed record of an invented measurement."""
    values: dict[str, Any] = {
        "processor": "Some CPU (1/2)",
        "isa": "v4",
        "group": "linear_gemv4",
        "sources": sources("linear_gemv4"),
        "workload": SMALL.to_json(),
        "knobs": {
            "stream_near": 0,
            "stream_far": 16384,
            "stream_far_level": 2,
            "scales_ahead": 0,
            "gemv_panels": 4,
        },
        "status": "ok",
        "host": "here",
        "date": "2026-11-23T00:00:00+00:00",
        "seconds": 9e-6,
        "baseline": 10e-6,
        "ratio": 0.9,
        "noise": 0.01,
        "rounds": 31,
        "confirmed": True,
    }
    return Record(**{**values, **changes})
