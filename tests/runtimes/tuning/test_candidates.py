"""Compiled candidates: every value of every knob computes the same bits on real memory, and wrong ones are found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isofold.compiler.errors import InputError
from isofold.runtimes.kernels.knobs import knobs_of
from isofold.runtimes.tuning.candidates import Builder, needed_groups
from isofold.runtimes.tuning.child import Child, LostError
from isofold.runtimes.tuning.machines import Facts, Machine, compared
from isofold.runtimes.tuning.worker import difference
from isofold.runtimes.tuning.workloads import Workload, default_workloads, groups_of, reduced

FACTS = Facts("Some CPU (1/2)", "here", "v4", 2, 1 << 20)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Builder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISOFOLD_CACHE", str(shared_cache))
        with Builder(tmp_path_factory.mktemp("candidates"), workers=2) as found:
            yield found


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    found = Machine()
    yield found
    found.close()


def _all_extreme(group: str, isa: str) -> list[dict[str, int]]:
    """For each knob its first and last value, the others at their defaults."""
    default = {k.name: k.default_of(isa, group) for k in knobs_of(group)}
    found = [{**default, k.name: value} for k in knobs_of(group) for value in (k.values[0], k.values[-1])]
    return [candidate for candidate in found if candidate != default]


CASES = [
    ("linear_gemv4", [Workload("linear", 4, 32, 320, 176, 1, 2, cold=False, zero=z) for z in (False, True)]),
    ("linear_gemv4", [Workload("linear", 4, 0, 320, 160, 1, cold=False, gated=True)]),
    ("linear_gemv3", [Workload("linear", 3, 64, 320, 96, 1, cold=False, zero=True)]),
    ("linear_g", [Workload("linear", 4, 32, 4160, 48, 70, cold=False)]),
    ("linear_pc", [Workload("linear", 8, 0, 320, 48, m, cold=False, zero=True) for m in (1, 11)]),
    ("linear_driver", [Workload("linear", 4, 32, 4160, 48, m, cold=False) for m in (5, 70)]),
    ("linear_float4", [Workload("linear_float", 4, 32, 320, 48, 2, cold=False)]),
    ("attention", [Workload("attention", 32, 0, 72, 300, m, 2, heads=3, cold=False) for m in (9, 70)]),
    ("attention_row", [Workload("attention", 32, 0, 72, 300, 1, 2, heads=3, cold=False)]),
    (
        "linear_dense",
        [Workload("linear_dense", 32, 0, 301, 72, m, cold=False, gated=m == 5) for m in (1, 5, 30)],
    ),
]


def _ends(group: str) -> list[dict[str, int]]:
    """All knobs at their first values, and all at their last."""
    return [{k.name: k.values[end] for k in knobs_of(group)} for end in (0, -1)]


@pytest.mark.parametrize("isa", ["v3", "v4"])
def test_knobs_change_no_result(builder: Builder, machine: Machine, isa: str) -> None:
    for group, workloads in (CASES[0], *CASES[-3:], *([CASES[5]] if isa == "v4" else [])):
        check(builder, machine, isa, group, workloads, _ends(group))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["v3", "v4"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_knob_alone_changes_no_bit(builder: Builder, machine: Machine, isa: str, number: int) -> None:
    group, workloads = CASES[number]
    candidates = _all_extreme(group, isa)
    if group == "linear_gemv4":
        candidates.append({**candidates[-1], "gemv_panels": 2})
    check(builder, machine, isa, group, workloads, candidates)


def check(
    builder: Builder,
    machine: Machine,
    isa: str,
    group: str,
    workloads: list[Workload],
    candidates: list[dict[str, int]],
) -> None:
    """The candidates give what the defaults give, bit by bit where the order of sums stays, on every workload."""
    default = {k.name: k.default_of(isa, group) for k in knobs_of(group)}
    made = builder.libraries(isa, group, workloads, [default, default, *candidates])
    libraries = [path for path in made if isinstance(path, Path)]
    assert len(libraries) == len(made), made
    for workload in workloads:
        assert group in needed_groups(workload) or group == "linear_driver"
        exact = all(knob.exact for knob in knobs_of(group))
        results = machine.compare(libraries, workload, FACTS, isa, 2, exact)
        assert [r for r in results if isinstance(r, str)] == []


def test_a_wrong_candidate_is_told_from_a_slow_one(
    builder: Builder, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload("linear", 4, 32, 320, 96, 1, cold=False)
    default = {k.name: k.default_of("v4", "linear_gemv4") for k in knobs_of("linear_gemv4")}
    good = builder.libraries("v4", "linear_gemv4", [workload], [default, default])
    # As if a kernel for two panels had been linked with a driver that believes in four.
    real = Builder._object

    def other(self: Builder, isa: str, group: str, settings: object) -> Path:
        from isofold.runtimes.kernels.knobs import Settings

        swapped = Settings({group: {"gemv_panels": 2}}) if group == "linear_gemv4" else settings
        return real(self, isa, group, swapped)  # type: ignore[arg-type] # settings

    monkeypatch.setattr(Builder, "_object", other)
    wrong = builder.libraries("v4", "linear_gemv4", [workload], [{**default, "gemv_panels": 4}])
    paths = [path for path in (*good, *wrong) if isinstance(path, Path)]
    (result,) = machine.compare(paths, workload, FACTS, "v4", 2, exact=True)
    assert isinstance(result, str)
    assert "outputs differ from the defaults'" in result


def test_a_candidate_that_crashes_takes_only_its_process(builder: Builder, tmp_path: Path) -> None:
    workload = Workload("linear", 8, 0, 320, 48, 1, cold=False)
    default = {k.name: k.default_of("v4", "linear_pc") for k in knobs_of("linear_pc")}
    (good,) = builder.libraries("v4", "linear_pc", [workload], [default])
    assert isinstance(good, Path)
    machine = Machine()
    with pytest.raises(LostError, match="ended with code -11"):
        # The kernels that this workload needs are null in a library without any.
        machine.compare([builder.any_library()] * 2, workload, FACTS, "v4", 2, exact=True)
    machine.close()
    again, twin = Machine(), tmp_path / "twin.so"
    shutil.copyfile(good, twin)
    assert again.compare([good, twin], workload, FACTS, "v4", 2, exact=True) == []
    again.close()


def test_a_child_that_does_not_answer_is_ended() -> None:
    child = Child("isofold.runtimes.tuning.worker")
    with pytest.raises(LostError, match="no answer in time"):
        child.ask({"do": "machine", "libraries": []}, timeout=0.0)
    with pytest.raises(LostError):
        child.ask({}, timeout=1)


def test_the_machine_is_what_the_compiler_thinks_it_is(builder: Builder, machine: Machine) -> None:
    from isofold.compiler.processor import processor

    facts = machine.facts(builder.any_library())
    assert facts.processor == processor()
    assert facts.cores >= 1
    assert facts.cache > 1 << 18


def test_noise_is_at_least_what_two_copies_differ_by() -> None:
    steady = [1.0] * 9
    answer = {
        "wrong": [None, None, None, "2 of 9", None],
        "seconds": [steady, [1.1] * 9, [0.5] * 9, [], steady],
    }
    one, wrong, other = compared(answer)
    assert wrong == "2 of 9"
    assert not isinstance(one, str)
    assert not isinstance(other, str)
    assert one.ratio == pytest.approx(0.5 / 1.05)
    assert one.noise == other.noise == pytest.approx(0.1 / 1.05)


def test_bursts_of_other_work_do_not_change_a_ratio() -> None:
    rng = np.random.default_rng(0)
    steady = rng.uniform(1.0, 1.002, (3, 61))
    busy = steady + (rng.random((3, 61)) < 0.5) * rng.exponential(2.0, (3, 61))
    (quiet,) = compared({"wrong": [None] * 3, "seconds": steady.tolist()})
    (result,) = compared({"wrong": [None] * 3, "seconds": busy.tolist()})
    assert not isinstance(result, str)
    assert not isinstance(quiet, str)
    assert result.ratio == pytest.approx(quiet.ratio, abs=2e-3)


def test_what_differs_is_said() -> None:
    wanted = np.array([1, 2, 3], np.float32)
    near = wanted * np.float32(1 + 3e-6)
    assert difference(wanted, wanted.copy(), True, "here") is None
    assert "3 of 3 outputs differ" in str(difference(wanted, near, True, "here"))
    assert difference(wanted, near, False, "here") is None
    assert "1.0e-03" in str(difference(wanted, wanted * np.float32(1.001), False, "here"))


def test_default_shapes_cover_every_group_once_reduced() -> None:
    workloads = reduced(default_workloads(2), "v4")
    groups = {group for w in workloads for group in groups_of(w, "v4")}
    assert groups == {
        "linear_gemv2",
        "linear_gemv3",
        "linear_gemv4",
        "linear_g",
        "linear_pc",
        "linear_driver",
        "linear_float4",
        "linear_dense",
        "attention",
        "attention_row",
    }
    assert len({w.name for w in workloads}) == len(workloads)
    assert all(Workload.from_json(w.to_json()) == w for w in workloads)
    many = [Workload("linear", 8, 0, 64 * i, 64, 1) for i in range(1, 20)]
    assert [w.k for w in reduced(many, "v4")] == [64 * 19, 64 * 18, 64 * 17, 64 * 16]


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(InputError, match="No kernel takes this workload"):
        Workload("linear", 5, 32, 64, 64, 1)
    with pytest.raises(InputError, match=r"no workload[\s\S]*colour"):
        Workload.from_json({"colour": "red"})
