"""What a build of the op library takes: this machine's results, else what is shipped; and that its name tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isofold.compiler.processor import processor
from isofold.runtimes.onnx.oplib import build
from isofold.runtimes.tuning import selection
from isofold.runtimes.tuning.database import Database

from .conftest import record

KNOBS = {"linear_gemv4": record().knobs}
OTHER = {**record().knobs, "gemv_panels": 2}


@pytest.fixture(autouse=True)
def _nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selection, "_SHIPPED", tmp_path / "tuned.jsonl")


def own(*records: object) -> None:
    Database(selection.database_path()).add(records)  # type: ignore[arg-type] # records


def ship(*records: object) -> None:
    Database(selection._SHIPPED).add(records)  # type: ignore[arg-type] # records


def test_own_results_come_first_then_shipped_ones() -> None:
    assert all(not settings for settings in selection.settings_for_build().values())
    name = build._file_name(selection.settings_for_build())
    ship(record(sources="of an older version"))
    assert selection.settings_for_build()["v4"].to_json() == KNOBS, "shipped ones of another processor"
    assert build._file_name(selection.settings_for_build()) != name
    ship(record(processor=processor(), knobs=OTHER))
    assert selection.settings_for_build()["v4"].to_json() == {"linear_gemv4": OTHER}
    own(record(processor=processor()), record(processor="Third (5/6)", knobs=OTHER, isa="v3"))
    assert selection.settings_for_build()["v4"].to_json() == KNOBS
    assert not selection.settings_for_build()["v3"]
    assert selection.settings_for_build(own=False)["v4"].to_json() == {"linear_gemv4": OTHER}


def test_where_the_defaults_won_here_shipped_values_are_not_taken() -> None:
    ship(record(processor=processor()))
    own(replace(record(processor=processor(), knobs=OTHER), ratio=1.2))
    assert not selection.settings_for_build()["v4"]


def test_a_damaged_database_does_not_stop_a_build() -> None:
    selection.database_path().write_text("nonsense\n")
    assert not selection.settings_for_build()["v4"]


def test_the_library_in_the_package_yields_to_a_tuned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "packaged.so"
    packaged.write_bytes(b"library")
    monkeypatch.setattr(build, "_PACKAGED", packaged)
    monkeypatch.delenv("ISOFOLD_OPS_LIBRARY", raising=False)
    assert build.library_path() == packaged
    own(record(processor=processor()))
    tuned = build.cache_folder() / build._file_name(selection.settings_for_build())
    tuned.write_bytes(b"tuned")
    try:
        assert build.library_path() == tuned
        monkeypatch.setattr(build, "_has_tvm", lambda: False)
        tuned.unlink()
        assert build.library_path() == packaged
    finally:
        tuned.unlink(missing_ok=True)
