"""The cost model: curves, limits, kinds, what the report says, and a machine that is really measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import isofold
from isofold.compiler import machine as machine_module
from isofold.compiler import measure_machine
from isofold.compiler.cli import app
from isofold.compiler.cost_model import (
    FLOAT_LINEAR,
    Machine,
    Work,
    dense_alternatives,
    kind_of,
    thin_works,
    work_of,
    working_set,
)
from isofold.compiler.errors import InputError
from isofold.compiler.frontend import prepare
from isofold.compiler.recipe import GROUP_SIZES, PRESETS

from ..invented_times import invent_profiles

INT8, INT4 = "linear_packed 8 bits", "linear_packed 4 bits in groups"


def made(**paces: float) -> Machine:
    """1 GB/s from memory, 10 GB/s from a cache of a megabyte; paces at one row, and 100 times that at 100."""
    curves = {kind.replace("_", " "): [(1.0, pace), (100.0, 100 * pace)] for kind, pace in paces.items()}
    return Machine("made up", 1, 1e-6, [(1e6, 1e10), (1e8, 1e9)], {**curves})


@given(st.floats(1, 1e10), st.floats(1, 1e10))
def test_a_larger_working_set_is_never_faster(first: float, second: float) -> None:
    machine = made(k=1e-15)
    small, large = sorted((first, second))
    near, far = (machine.predict(Work("k", 1, 1, 10**6), size) for size in (small, large))
    assert near is not None
    assert far is not None
    assert near.seconds <= far.seconds * (1 + 1e-12)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_more_rows_are_never_faster(first: int, second: int) -> None:
    machine = made(k=1e-12)
    few, many = sorted((first, second))
    short, long = (machine.predict(Work("k", rows, 10**6, 1), 1) for rows in (few, many))
    assert short is not None
    assert long is not None
    assert short.seconds <= long.seconds * (1 + 1e-12)


def test_what_limits_a_linear_is_what_takes_longest() -> None:
    machine = made(k=1e-12)
    memory = machine.predict(Work("k", 1, 10, 10**7), 1e9)
    assert memory is not None
    assert memory.limit == "memory"
    assert math.isclose(memory.seconds, 1e-6 + 1e-2)
    arithmetic = machine.predict(Work("k", 1000, 10**6, 10), 1)
    assert arithmetic is not None
    assert arithmetic.limit == "arithmetic"
    assert math.isclose(
        arithmetic.seconds, 1e-6 + 10**6 * 1e-12 * 1000
    )  # past the last point: ten times that at 100
    nothing = machine.predict(Work("k", 1, 1, 1), 1)
    assert nothing is not None
    assert nothing.limit == "overhead"
    assert machine.predict(Work("another kind", 1, 1, 1), 1) is None


def test_between_points_the_curve_is_straight_in_the_logarithm() -> None:
    found = made(k=1e-12).predict(Work("k", 10, 10**9, 1), 1)
    assert found is not None
    assert math.isclose(found.seconds, 1e-6 + 10**9 * 1e-11)


def test_a_machine_survives_json() -> None:
    machine = made(k=1e-12)
    again = Machine.from_json(json.loads(json.dumps(machine.to_json())))
    work = Work("k", 7, 1000, 2000)
    assert again.predict(work, 3e6) == machine.predict(work, 3e6)
    for damaged in ({}, {**machine.to_json(), "bandwidth": 3}, {**machine.to_json(), "threads": "many"}):
        with pytest.raises(InputError, match="not the description of a machine"):
            Machine.from_json(damaged)


@pytest.mark.parametrize(
    ("recipe", "kind", "size"),
    [
        ("float32", FLOAT_LINEAR, 64 * 96 * 4),
        ("w8a8", INT8, 64 * 96 + 64 * 4 + 64 * 4),  # codes, scales, row sums
        ("w4a16", "linear_packed_float 4 bits in groups", 64 * 96 // 2 + 64 * 96 // 32 * 2),
    ],
)
def test_the_work_of_a_linear_is_counted(recipe: str, kind: str, size: int) -> None:
    model = nn.Linear(96, 64, bias=False)
    program = prepare(model, (torch.randn(2, 5, 96),), recipe=recipe, verify=False).program
    works = [work for node in program.graph.nodes if (work := work_of(node)) is not None]
    assert works == [Work(kind, 10, 64 * 96, size)]
    assert working_set(program.graph) == size


def test_a_convolution_counts_its_positions_as_rows() -> None:
    model = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    program = prepare(model, (torch.randn(1, 8, 10, 12),), recipe="w8a8", verify=False).program
    (work,) = [work for node in program.graph.nodes if (work := work_of(node)) is not None]
    assert (work.kind, work.rows, work.elements) == ("conv_packed", 120, 16 * 8 * 9)


def test_alternatives_are_dense_and_no_wider_than_the_format() -> None:
    int4 = Work(INT4, 1, 3200, 1800)
    assert list(dense_alternatives(int4)) == ["int8"]
    assert list(dense_alternatives(Work(INT8, 1, 3200, 3200))) == []
    small = dense_alternatives(Work("linear_packed 2 bits in groups", 1, 3200, 1000))
    assert {name: work.kind for name, work in small.items()} == {"int8": INT8, "int4": INT4}
    floats = dense_alternatives(Work("linear_packed_float 4 bits in groups", 1, 3200, 1800))
    assert {name: work.kind for name, work in floats.items()} == {"int8": "linear_packed_float 8 bits"}
    assert dense_alternatives(Work(FLOAT_LINEAR, 1, 3200, 12800)) == {}


def _report(monkeypatch: pytest.MonkeyPatch, machine: Machine, own: bool) -> dict[str, object]:
    monkeypatch.setattr("isofold.compiler.frontend.known_machine", lambda: (machine, own))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return dict(isofold.compile(model, (torch.randn(1, 64),), recipe="w4a8", measure=False).report)


def test_the_report_predicts_every_layer_and_names_slow_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Machine("made up", 1, 0.0, [(1.0, 1e12)], {INT4: [(1.0, 2e-9)], INT8: [(1.0, 1e-9)]})
    report = _report(monkeypatch, slow, False)
    layers, model = report["layers"], report["cost_model"]
    assert isinstance(layers, list)
    assert isinstance(model, dict)
    assert [round(row["predicted_microseconds"], 3) for row in layers] == [8.192, 8.192]
    assert {row["limit"] for row in layers} == {"arithmetic"}
    assert model["measured_here"] is False
    assert [(row["module"], row["faster"]) for row in model["slower"]] == [("0", "int8"), ("2", "int8")]
    fast = Machine("made up", 1, 0.0, [(1.0, 1e12)], {INT4: [(1.0, 1e-9)], INT8: [(1.0, 1e-9)]})
    assert _report(monkeypatch, fast, True)["cost_model"]["slower"] == []  # type: ignore[index]


def _compiled(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, recipe: object, model: nn.Module
) -> dict[str, Any]:
    monkeypatch.setattr("isofold.compiler.frontend.known_machine", lambda: (machine, True))
    report = isofold.compile(model, (torch.randn(1, 256),), recipe=recipe, measure=False).report
    return {"layers": report["layers"], **report["cost_model"]}


def test_a_format_without_rates_takes_those_of_one_that_is_decoded_alike() -> None:
    machine = Machine("made up", 1, 0.0, [(1.0, 1e12)], {"linear_coded nf4 in groups": [(1.0, 7e-9)]})
    for kind in ("linear_coded nf4 in groups", "linear_coded nf4", "linear_coded table4 in groups"):
        assert machine.pace_of(kind) == [(1.0, 7e-9)]
    for kind in ("linear_coded mxfp4 in groups", "linear_packed 4 bits", "linear_codebook 1x8"):
        assert machine.pace_of(kind) is None
    both = Machine("made up", 1, 0.0, [], {INT8: [(1.0, 1.0)], f"{INT8} in groups": [(1.0, 2.0)]})
    assert both.pace_of(f"{INT8} in groups") == [(1.0, 2.0)]


def test_fp8_activations_cost_what_fp8_weights_do_and_are_named_slower_than_int8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped = Machine.from_json(json.loads(machine_module._SHIPPED.read_text()))
    own = Machine("made up", 1, 0.0, [], {"linear_coded e4m3": [(1.0, 2.0)], "linear_fp8 e4m3": [(1.0, 3.0)]})
    assert own.pace_of("linear_fp8 e5m2 in groups") == [(1.0, 3.0)]
    assert shipped.pace_of("linear_fp8 mxfp8_e5m2 in groups") == shipped.paces["linear_coded e4m3"]
    for recipe in ("fp8", "w8-fp8"):
        found = _compiled(monkeypatch, shipped, recipe, nn.Linear(256, 2048))
        assert found["unmeasured"] == []
        (row,) = found["layers"]
        (slow,) = found["slower"] or [None]
        if (
            recipe == "fp8"
        ):  # against int8 with int8 activations; FP8 weights alone against int8 with float ones
            assert slow is not None
            assert slow["faster"] == "int8"
            assert slow["microseconds"] == row["predicted_microseconds"] > 1.5 * slow["faster_microseconds"]


def test_the_shipped_machine_predicts_every_format_but_six_bits() -> None:
    machine = Machine.from_json(json.loads(machine_module._SHIPPED.read_text()))
    unknown = set()
    for form in GROUP_SIZES:
        recipe = {"weights": {"format": form}}
        program = prepare(nn.Linear(256, 64), (torch.randn(3, 256),), recipe=recipe, verify=False).program
        (work,) = [work for node in program.graph.nodes if (work := work_of(node)) is not None]
        unknown |= {form} if machine.predict(work, 1e6) is None else set()
    assert unknown == {"mxfp6_e3m2", "mxfp6_e2m3"}


def test_the_report_names_formats_without_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _compiled(monkeypatch, made(k=1.0), {"weights": {"format": "mxfp6_e2m3"}}, nn.Linear(256, 64))
    assert found["unmeasured"] == ["linear_coded mxfp6_e2m3 in groups"]
    assert found["layers"][0]["predicted_microseconds"] is None
    assert found["slower"] == []


def test_a_part_of_low_rank_is_counted_with_its_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding is cheap here and float products are not, so that the thin part is what makes int4 slower than int8.
    factor = "linear_packed_float 8 bits"
    paces = {INT4: [(1.0, 1e-12)], INT8: [(1.0, 2e-12)], FLOAT_LINEAR: [(1.0, 1e-9)], factor: [(1.0, 3e-12)]}
    machine = Machine("made up", 1, 0.0, [(1.0, 1e15)], paces)
    torch.manual_seed(0)
    model = nn.Linear(256, 128)
    plain = {"bits": 4, "group_size": 32}
    activations = {"activations": {"mode": "dynamic"}}
    without = _compiled(monkeypatch, machine, {"weights": plain, **activations}, model)
    beside = _compiled(monkeypatch, machine, {"weights": {**plain, "low_rank": 8}, **activations}, model)
    # Panels have 16 rows: the factor of 8 bits and rank 8 has 8 that are empty.
    extra = 1e6 * (1e-9 * 8 * 128 + 3e-12 * 8 * 256)
    times = [found["layers"][0]["predicted_microseconds"] for found in (without, beside)]
    assert times[1] - times[0] == pytest.approx(extra, rel=1e-6)
    assert without["slower"] == []
    assert [row["faster"] for row in beside["slower"]] == ["int8"]


def test_a_residual_that_is_no_thin_part_costs_nothing() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(x)

    program = prepare(Added(), (torch.randn(2, 64),), recipe="w8a8").program
    assert all(thin_works(node) == [] for node in program.graph.nodes)


@pytest.mark.usefixtures("wide_rates")
def test_zeros_that_are_skipped_have_the_times_of_their_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(256, 256)
    with torch.no_grad():
        model.weight *= torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.9
    recipe = {
        "weights": {"bits": 8},
        "activations": {"mode": "dynamic"},
        "sparsity": {"gain": 1e-3, "layout": "windows"},
    }
    found = _compiled(monkeypatch, made(k=1.0), recipe, model)
    assert not found["unmeasured"]
    (row,) = found["slower"]
    assert row["format"] == "zeros skipped, windows of int8"
    assert row["faster"] == "dense"
    assert row["microseconds"] > 1.1 * row["faster_microseconds"]
    assert found["layers"][0]["predicted_microseconds"] == row["microseconds"]
    with torch.no_grad():
        model.weight *= torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) < 0.05
    assert _compiled(monkeypatch, made(k=1.0), recipe, model)["slower"] == []


def test_the_shipped_machine_knows_every_format_of_the_presets() -> None:
    machine = Machine.from_json(json.loads(machine_module._SHIPPED.read_text()))
    for recipe in machine_module.linear_formats().values():
        model = nn.Linear(256, 64, bias=False)
        program = prepare(model, (torch.randn(3, 256),), recipe=recipe, verify=False).program
        (kind,) = [kind for node in program.graph.nodes if (kind := kind_of(node)) is not None]
        # FP8 activations may take the pace of FP8 weights alone, which was measured.
        known = kind in machine.paces or (kind.startswith("linear_fp8") and machine.pace_of(kind) is not None)
        assert known, f"{recipe.name}: measure again with `isofold machine --json`"


def test_the_command_measures_once_and_keeps_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine_module, "cache_folder", lambda: tmp_path)
    for module in (machine_module, measure_machine):
        monkeypatch.setattr(module, "linear_formats", lambda: {"one": PRESETS["w8a8"]})
    monkeypatch.setattr(measure_machine, "ROWS", (1, 64))
    points = {"bitmask int8": [(1.0, 0.5, 1e-11)]}
    monkeypatch.setattr(measure_machine, "measured_sparse", lambda threads, folder: points)
    monkeypatch.setattr(measure_machine, "SETS", (1 << 20, 1 << 22))
    invent_profiles(monkeypatch, lambda rows, outputs: 2e-6 + 1e-9 * rows * outputs)
    first = CliRunner().invoke(app, ["machine", "--threads", "1", "--json", "--quiet"])
    assert first.exit_code == 0, first.output
    found = Machine.from_json(json.loads(first.stdout))
    assert set(found.paces) == {INT8}
    assert found.sparse == points
    size, small = measure_machine.SIZE, measure_machine.SMALL
    assert found.overhead == pytest.approx(2e-6 + 1e-9 * small)
    assert [(rows, pace) for rows, pace in found.paces[INT8]] == [
        (rows, pytest.approx(1e-9 * (rows * size - small) / size**2, rel=1e-6, abs=0)) for rows in (1, 64)
    ]
    assert all(rate > 1e8 for _, rate in found.bandwidth)
    second = CliRunner().invoke(app, ["machine", "--threads", "1"])
    assert second.exit_code == 0, second.output
    assert INT8 in second.output
    assert "GB/s" in second.output
    assert machine_module.known_machine(1) == (found, True)
    assert machine_module.known_machine(2)[1] is False


class Selected(nn.Module):
    """A linear on the rows that the data chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x[x.sum(-1) > 0])


@pytest.mark.parametrize("recipe", ["float32", "w4a8", "w4a16"])
def test_rows_that_depend_on_the_data_count_as_one(recipe: str) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    prepared = prepare(Selected(), (x,), recipe=recipe)
    (work,) = [work for node in prepared.program.graph.nodes if (work := work_of(node)) is not None]
    assert work.rows == 1
    assert work.elements == 32 * 64
    assert prepared.program(x).shape == (int((x.sum(-1) > 0).sum()), 32)


def test_a_machine_that_was_not_measured_is_like_the_shipped_one_of_its_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ISOFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_module, "_DATA", tmp_path)
    monkeypatch.setattr(machine_module, "_SHIPPED", tmp_path / "machine.json")
    for file, name in (("machine.json", "old"), ("machine-new.json", "new")):
        made = Machine(name, 2, 1e-6, [(1.0, 1e9)], {INT8: [(1.0, 1e-11)]})
        (tmp_path / file).write_text(json.dumps(made.to_json()))
    for here, wanted in (("new", "new"), ("old", "old"), ("unknown", "old")):
        monkeypatch.setattr(machine_module, "processor", lambda here=here: here)
        found, own = machine_module.known_machine(1)
        assert (found.name, own) == (wanted, False)
