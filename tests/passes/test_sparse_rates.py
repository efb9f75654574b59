"""Rates of sparse linears: those a machine was measured to have, else those of its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from isofold.compiler import machine as machine_module
from isofold.compiler import measure_sparse
from isofold.compiler.cost_model import Machine
from isofold.compiler.measure_sparse import measured_sparse
from isofold.passes import sparse_rates
from isofold.passes.sparse_rates import MANY, NARROW, WIDE, Rates, current, fitted
from isofold.passes.sparse_speed import sparse_time

from ..invented_times import invent_profiles

WEIGHTS = 1 << 20
SHARES = {"1:4": (0.25,), "2:4": (0.5,), "4:8": (0.5,), "windows": (0.1, 0.05)}


def measured_by(rates: Rates, factor: float) -> Machine:
    """A machine on which everything takes `factor` times as long as the model says, without memory."""
    sparse = {
        f"{layout} {value}": [
            (
                float(rows),
                share,
                factor
                * 1e-9
                * sparse_time(layout, value, rows, WEIGHTS, int(share * WEIGHTS), 0, rates)
                / WEIGHTS,
            )
            for rows in (1, 2, 4, MANY)
            for share in SHARES.get(layout, (0.5, 0.25))
        ]
        for layout, value in rates.paces
    }
    names = {"int8": "linear_packed 8 bits", "int4": "linear_packed 4 bits in groups", "float32": "float32"}
    dense = {
        names[kind]: [(1.0, 1e-12), (float(MANY), factor * 1e-9 * MANY * pace.word / 64)]
        for kind, pace in rates.dense.items()
    }
    return Machine("made up", 1, 0.0, [(1.0, 9e10), (2.0, 2e10)], dense, sparse)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("rates", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_machine_that_follows_the_model_gives_its_rates_back(rates: Rates, factor: float) -> None:
    found = fitted(measured_by(rates, factor), WIDE)
    assert found.bandwidth == pytest.approx(20)
    for kind, dense in rates.dense.items():
        assert found.dense[kind].word == pytest.approx(factor * dense.word)
        assert found.dense[kind].bandwidth == pytest.approx(20 * (8 / 9 if kind == "int4" else 1))
    for (layout, value), pace in WIDE.paces.items():
        for rows in (1, min(pace.few, 4), MANY, 256):
            share = SHARES.get(layout, (0.5, 0.25))[-1]
            size = int(share * WEIGHTS)
            expected = factor * sparse_time(layout, value, rows, WEIGHTS, size, 0, rates)
            assert sparse_time(layout, value, rows, WEIGHTS, size, 0, found) == pytest.approx(
                expected, rel=1e-3
            )


def test_what_was_not_measured_is_as_on_a_machine_of_its_kind() -> None:
    found = fitted(Machine("made up", 1, 0.0, [(1.0, 2e10)], {}), NARROW)
    assert found.paces == NARROW.paces
    assert found.dense == NARROW.dense


def test_the_machine_s_own_rates_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISOFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(sparse_rates, "expands_bytes", lambda: True)
    assert current() == WIDE
    monkeypatch.setattr(sparse_rates, "expands_bytes", lambda: False)
    assert current() == NARROW
    made = measured_by(WIDE, 2.0)
    monkeypatch.setattr("isofold.compiler.measure_machine.measured", lambda name, threads, say: made)
    machine_module.machine()
    assert current() == fitted(made, NARROW)


def test_every_layout_asked_for_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forms = {
        "bitmask": ("float32", "bfloat16", "int8"),
        "panels": ("int4",),
        "1:4": ("int8",),
        "16x4": ("int8",),
    }
    for name, value in {"INPUTS": 256, "OUTPUTS": 256, "REPEATS": 1, "RUNS": (2, 1), "HELD": forms}.items():
        monkeypatch.setattr(measure_sparse, name, value)
    invent_profiles(monkeypatch, lambda rows, outputs: 1e-6 + 1e-7 * rows * outputs)
    found = measured_sparse(1, tmp_path)
    assert set(found) == {f"{layout} {value}" for layout, values in forms.items() for value in values}
    assert [(rows, share) for rows, share, _ in found["1:4 int8"]] == [(r, 0.25) for r in measure_sparse.ROWS]
    for points in found.values():
        for rows, _, seconds in points:
            assert seconds == pytest.approx(1e-7 * rows / 256, rel=1e-6, abs=0), (
                "a node's own time is taken away"
            )
