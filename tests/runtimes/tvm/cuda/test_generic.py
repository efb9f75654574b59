"""What TVM generates for the GPU: MetaSchedule's traces against dlight's schedule, without a GPU.

Traces are invented, become cubins, and go through search, database and compilation; the device is an invented one,
which runs the same function compiled for this processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from isofold.runtimes.tuning.database import Database, read_records
from isofold.runtimes.tuning.machines import Facts
from isofold.runtimes.tuning.search import TRACE
from isofold.runtimes.tvm.compile_cpu import cpu_target
from isofold.runtimes.tvm.cuda import tune
from isofold.runtimes.tvm.cuda.candidates import Library, Toolchain
from isofold.runtimes.tvm.cuda.device_module import target_for
from isofold.runtimes.tvm.cuda.generic import (
    NAME,
    Generic,
    GenericUnit,
    by_trace,
    default_of,
    generic_functions,
    group_of,
    with_traces,
)
from isofold.runtimes.tvm.cuda.toolkit import Resources
from isofold.runtimes.tvm.cuda.tune_worker import compare
from isofold.runtimes.tvm.cuda.tuned import TunedValues
from isofold.runtimes.tvm.schedule_cpu import schedule_function
from isofold.runtimes.tvm.schedule_traces import Traced, number_of
from isofold.runtimes.tvm.traces import MetaSchedule, Workshop

ARCHS = ("sm_80",)


def pooled(width: Any = 70) -> tirx.PrimFunc:
    """The largest of five neighbours."""
    x = te.placeholder((18, width), "float32", "x")
    q = te.reduce_axis((0, 5), "q")
    y = te.compute((18, width - 4), lambda c, i: te.max(x(c, i + q), axis=q), "pool")
    return te.create_prim_func([x, y], "int64")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Some traces of `pooled` for sm_80."""
    workshop = Workshop()
    try:
        return MetaSchedule(workshop, pooled(), target_for("sm_80"), {}, 1, 0)([], 3)
    finally:
        workshop.close()


def test_traces_become_cubins(texts: list[str], tmp_path: Path) -> None:
    assert len(texts) == len(set(texts)) >= 2
    units = [GenericUnit(default_of(pooled(), target_for("sm_80")))]
    units += [GenericUnit(by_trace(pooled(), Traced(text))) for text in texts[:2]]
    for made in Toolchain(tmp_path, "sm_80").libraries(units):  # type: ignore[arg-type] # it takes what has functions
        assert isinstance(made.path, Path), made.path
        assert made.path.exists()
        assert made.spills == 0
        assert all(r.arch == "sm_80" and r.registers > 0 for r in made.resources)


def test_only_known_sizes_have_traces() -> None:
    n = tirx.Var("n", "int64")
    module = tvm.IRModule(
        {"a": pooled(), "b": pooled(), "c": pooled(n), "d": default_of(pooled(), target_for("sm_80"))}
    )
    assert [(g.name, g.group) for g in generic_functions(module)] == [("a", group_of(pooled()))]


class Chip:
    """This processor in the place of a GPU. seconds: of a candidate, by the text of its trace (None: dlight)."""

    def __init__(self, seconds: Callable[[str | None], float]) -> None:
        self.seconds = seconds
        self.texts: dict[str, str | None] = {}
        function = schedule_function(pooled(), cpu_target("tvm-cpu")).with_attr("global_symbol", NAME)
        self.module = tvm.compile(tvm.IRModule({NAME: function}), target=cpu_target("tvm-cpu")).jit()
        self.asked = 0

    def hire(self) -> Any:
        return self

    def close(self) -> None:
        pass

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        if question["do"] == "gpu":
            return self.facts()
        self.asked += 1
        return compare(self, question["specs"], question["rounds"], question["tolerance"])

    def facts(self) -> dict[str, Any]:
        return {
            "processor": "Invented 80",
            "host": "here",
            "isa": "sm_80",
            "cores": 0,
            "cache": 1 << 12,
            "free": 1 << 20,
        }

    def load(self, path: Path) -> Any:
        return {NAME: self.module[NAME], "path": str(path)}

    def place(self, array: np.ndarray[Any, Any]) -> Any:
        return tvm.runtime.tensor(array)

    def fetch(self, tensor: Any) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = tensor.numpy()
        return found

    def timer(self, module: Any, runs: Sequence[Any]) -> Callable[[], float]:
        return lambda: self.seconds(self.texts[module["path"]])

    def toolchain(self, scratch: Path, arch: str) -> Any:
        chip = self

        class Stub(Toolchain):
            def libraries(self, units: Sequence[Any]) -> list[Library]:
                made = []
                for unit in units:
                    self._count += 1
                    path = scratch / f"{self._count}"
                    script = unit.functions()[NAME].script()
                    chip.texts[str(path)] = None if made == [] else script
                    made.append(Library(path, (Resources("k", arch, 32, 0, 0, 0, 0),)))
                return made

        return Stub(scratch, arch)


def test_the_whole_loop_measures_keeps_resumes_and_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "ROUNDS", 2)
    monkeypatch.setattr(tune, "CONFIRMING_ROUNDS", 3)
    database, chip = tmp_path / "tuning.jsonl", Chip(lambda text: 1e-5 if text is None else 6e-6)
    generic = Generic("pool", pooled())
    options: dict[str, Any] = {
        "hire": chip.hire,
        "toolchain": chip.toolchain,
        "generics": [generic],
        "traces": 4,
    }
    result = tune.tune_kernels([], ARCHS, 600, database, **options)
    (row,) = result["workloads"]
    assert row["invented"]
    assert row["after"] == pytest.approx(0.6 * row["before"], rel=1e-3)
    assert (row["workload"], row["isa"], row["processor"]) == ("pool", "sm_80", "Invented 80")
    assert "1 that TVM generates with up to 4 traces of MetaSchedule each" in result["notes"][-1]
    records = read_records(database)[0]
    assert {r.status for r in records} == {"ok"}
    assert all(number_of(r.trace or "") == r.knobs[TRACE] for r in records)

    asked = chip.asked
    again = tune.tune_kernels([], ARCHS, 600, database, **options)
    assert again["measured"] == 0
    assert chip.asked == asked

    choice = TunedValues(ARCHS, database)
    module, failed = with_traces(tvm.IRModule({"pool": pooled()}), choice.trace)
    assert (failed, choice.used) == ({}, {generic.group})
    best = choice.trace(generic.group)
    assert best is not None
    tvm.ir.assert_structural_equal(module["pool"].body, by_trace(pooled(), best).body)
    assert "threadIdx.x" in module["pool"].script()
    assert TunedValues(("sm_90a",), database).trace(generic.group) is None, "another architecture"

    stale = tmp_path / "stale.jsonl"
    Database(stale).add([replace(r, sources="0" * 16) for r in records])
    assert TunedValues(ARCHS, stale).trace(generic.group) is None, "another version"


def test_a_trace_that_cannot_be_applied_leaves_dlights_schedule_and_is_told() -> None:
    module = tvm.IRModule({"pool": pooled()})
    made, failed = with_traces(module, lambda group: Traced('[[["NoSuch",[],[],[]]],[]]'))
    assert list(failed) == ["pool"]
    tvm.ir.assert_structural_equal(made, module)


def test_facts_name_the_architecture() -> None:
    kernels = tune.GpuKernels([], ARCHS, None, lambda arch: None, None)  # type: ignore[arg-type, return-value]
    kernels.generics = {group_of(pooled()): Generic("pool", pooled())}
    (search,) = kernels.searches(Facts("chip", "here", "sm_80", 0, 0), lambda *_: [])
    assert (search.isa, search.size, search.inventor) == ("sm_80", 0, None)
