"""Tuning of generated kernels' own parameters: records persist, resume and merge; what is chosen computes the same.

MetaSchedule's traces: `test_traces.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import te, tirx

from isofold.compiler.errors import InputError
from isofold.compiler.processor import processor
from isofold.runtimes.tuning.child import LostError
from isofold.runtimes.tuning.database import Database, Record, read_records
from isofold.runtimes.tuning.machines import Facts, Machine
from isofold.runtimes.tuning.search import Space
from isofold.runtimes.tuning.worker import LocalDevice
from isofold.runtimes.tvm import tune_cpu, tune_worker
from isofold.runtimes.tvm.compile_cpu import cpu_target
from isofold.runtimes.tvm.schedule_cpu import TUNED, function_key, schedule_cpu, schedule_report
from isofold.runtimes.tvm.schedule_rules import Shape
from isofold.runtimes.tvm.tune_cpu import tuned_schedules

from ...processes import silent_port
from ..lent_machines import killed_at_the_first_result, tracker

__all__ = ["tracker"]

tune_functions = partial(tune_cpu.tune_functions, traces=0)


@pytest.fixture
def target() -> Any:
    return cpu_target("tvm-cpu")


def product(n: int = 64, factor: float = 1.0) -> tirx.PrimFunc:
    m = tirx.Var("m", "int64")
    axis = te.reduce_axis((0, 48), "k")
    a, b = te.placeholder((m, 48), "float32", "a"), te.placeholder((48, n), "float32", "b")
    c = te.compute((m, n), lambda i, j: te.sum(a(i, axis) * b(axis, j) * factor, axis=axis), "c")
    return te.create_prim_func([a, b, c], "int64")


def copy() -> tirx.PrimFunc:
    x = te.placeholder((300, 300), "float32", "x")
    return te.create_prim_func([x, te.compute((300, 300), lambda i, j: x(i, j) * 2.0, "y")], "int64")


def compiled(module: tvm.IRModule, name: str, target: Any) -> Any:
    function = module[name].with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]


def test_spaces_have_what_the_rules_depend_on(target: Any) -> None:
    space = tune_cpu.space_of(product(), target)
    default = Shape.of(target)
    assert set(space.values) == {"rows", "columns"}
    assert space.default == {"rows": default.rows, "columns": default.columns}
    assert all(space.default[name] in values for name, values in space.values.items())
    assert tune_cpu.space_of(copy(), target).values == {}


FEW = Space({"rows": (2, 8), "columns": (16, 32)}, {"rows": 8, "columns": 32}, exact=False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three candidates and few rounds."""
    monkeypatch.setattr(tune_cpu, "ROUNDS", 3)
    monkeypatch.setattr(tune_cpu, "CONFIRMING_ROUNDS", 5)
    monkeypatch.setattr(tune_cpu, "space_of", lambda function, target: FEW)


def test_measuring_resuming_and_using(
    tmp_path: Path, target: Any, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "tuning.jsonl"
    module = tvm.IRModule({"product": product(), "same": product()})
    said: list[str] = []
    found = tune_functions(module, target, 600, database, progress=said.append, sizes={"m": 40})
    (row,) = found["workloads"]  # equal functions are one
    assert (row["workload"], row["tried"], row["isa"]) == ("product", 3, tune_cpu.isa_of(target))
    assert row["before"] > 0
    assert said[0].startswith("tune product v")
    assert "of 3 tried" in said[0]
    lines = read_records(database)[0]
    assert {r.group for r in lines} == {function_key(product())}
    assert {r.candidate for r in lines if not r.confirmed} == {
        json.dumps({"columns": c, "rows": r}) for r in (2, 8) for c in (16, 32) if (r, c) != (8, 32)
    }
    assert all(r.status == "ok" and r.workload == {"sizes": {"m": 40}, "size": tune_cpu.SIZE} for r in lines)
    assert found["measured"] == len(lines)

    monkeypatch.setattr(Machine, "ask", lambda *_: pytest.fail("everything was measured before"))
    again = tune_functions(module, target, 600, database, sizes={"m": 40})
    assert again["measured"] == 0
    assert again["workloads"][0]["before"] == pytest.approx(row["before"], rel=1)


def record_of(target: Any, function: tirx.PrimFunc, change: dict[str, int], **values: Any) -> Any:
    facts: dict[str, Any] = {
        "processor": processor(),
        "isa": tune_cpu.isa_of(target),
        "group": function_key(function),
        "sources": tune_cpu.schedule_sources(),
        "workload": tune_cpu.Sizes("here").to_json(),
        "knobs": change,
        "status": "ok",
        "host": "here",
        "date": "2026-11-28T00:00:00+00:00",
        "confirmed": True,
    }
    times = {"seconds": 0.5, "baseline": 1.0, "ratio": 0.5, "noise": 0.01, "rounds": 9}
    return Record(**{**facts, **times, **values})


def test_what_is_chosen_computes_the_same(tmp_path: Path, target: Any) -> None:
    database = tmp_path / "tuning.jsonl"
    Database(database).add([record_of(target, product(), {"rows": 3, "columns": 16})])
    shapes = tuned_schedules(database, target)
    module = tvm.IRModule({"product": product()})
    default, tuned = schedule_cpu(module, target), schedule_cpu(module, target, shapes)
    assert "16 neighbouring results, 3 rows" in schedule_report(tuned)["product"]
    assert schedule_report(default) != schedule_report(tuned)
    assert [TUNED in module["product"].attrs for module in (default, tuned)] == [False, True]
    rng = np.random.default_rng(0)
    for rows in (1, 7, 40):
        x, y = (rng.standard_normal(s).astype(np.float32) for s in ((rows, 48), (48, 64)))
        results = []
        for one in (default, tuned):
            out = tvm.runtime.tensor(np.zeros((rows, 64), np.float32))
            compiled(one, "product", target)(tvm.runtime.tensor(x), tvm.runtime.tensor(y), out)
            results.append(out.numpy())
        assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[0]).max()


@pytest.mark.parametrize(
    "values",
    [
        {"processor": "another"},
        {"sources": "0" * 16},
        {"status": "wrong"},
        {"ratio": 0.99, "noise": 0.1},
        {"confirmed": False},
        {"isa": "v2"},
    ],
    ids=["processor", "version", "wrong", "noise", "not confirmed", "instruction set"],
)
def test_records_that_do_not_count(tmp_path: Path, target: Any, values: dict[str, Any]) -> None:
    database = tmp_path / "tuning.jsonl"
    Database(database).add([record_of(target, product(), {"rows": 3}, **values)])
    assert tuned_schedules(database, target) == {}


def test_merging_and_a_cut_line(tmp_path: Path, target: Any) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    Database(two).add([record_of(target, product(), {"rows": 3})])
    two.write_bytes(two.read_bytes() + b'{"v":1,"proc')
    assert Database(one).merge(two) == 1
    assert list(tuned_schedules(one, target).values()) == [replace(Shape.of(target), rows=3)]
    assert tuned_schedules(two, target) == tuned_schedules(one, target)
    assert tuned_schedules(tmp_path / "none.jsonl", target) == {}


def test_a_candidate_that_takes_its_process_with_it_is_recorded_and_the_search_goes_on(
    tmp_path: Path, target: Any, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Machine.ask

    def ask(self: Machine, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        if crashing in question.get("changes", ()):
            raise LostError("its process ended with code -11")
        return whole(self, question, timeout)

    crashing = {"rows": 2, "columns": 16}
    monkeypatch.setattr(Machine, "ask", ask)
    database = tmp_path / "tuning.jsonl"
    found = tune_functions(tvm.IRModule({"product": product()}), target, 600, database)
    records = read_records(database)[0]
    (crashed,) = [r for r in records if r.status == "crashed"]
    assert (crashed.knobs, crashed.note) == (crashing, "its process ended with code -11")
    assert {r.candidate for r in records if r.status == "ok"} == {
        json.dumps({"columns": c, "rows": r}) for r, c in ((2, 32), (8, 16))
    }
    assert len(found["lost"]) == 1 + 2, "with the others, and twice alone"
    assert replace(Shape.of(target), **crashing) not in tuned_schedules(database, target).values()


def test_an_interrupted_run_goes_on_and_strange_records_are_kept(
    tmp_path: Path, target: Any, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, asked = tmp_path / "tuning.jsonl", []
    old = record_of(target, product(), {"rows": 2, "columns": 16}, processor="An old CPU (1/2)")
    stale = record_of(target, product(), {"rows": 2, "columns": 16}, sources="0" * 16)
    Database(database).add([old, stale])
    whole = Machine.ask

    def ask(self: Machine, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        asked.append(question)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, question, timeout)

    module = tvm.IRModule({"one": product(32), "two": product()})
    monkeypatch.setattr(Machine, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        tune_functions(module, target, 600, database, sizes={"m": 8})
    before = read_records(database)[0]
    assert len(before) >= 2 + 3
    found = tune_functions(module, target, 600, database, sizes={"m": 8})
    after = read_records(database)[0]
    assert after[: len(before)] == before
    assert len({r.key for r in after}) == len(after)
    assert [row["tried"] for row in found["workloads"]] == [3, 3]
    notes = "\n".join(found["notes"])
    assert "1 results of other processors (An old CPU (1/2)) are kept and do not count here" in notes
    assert "1 results of another version of the kernels or of TVM are kept and do not count" in notes


def test_a_wrong_result_is_found(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune_worker.compiled
    monkeypatch.setattr(
        tune_worker,
        "compiled",
        lambda f, t, shape: whole(f if shape == Shape.of(t) else product(factor=1.001), t, shape),
    )
    question = {
        "do": "function",
        "function": tvm.ir.save_json(product()),
        "target": tvm.ir.save_json(target),
        "changes": [{"rows": 2}, {"rows": 3, "no_such": 1}],
        "rounds": 2,
        "sizes": {},
        "size": 16,
    }
    answer = tune_worker.make(LocalDevice()).answer(question)
    assert answer["wrong"][:2] == [None, None]
    assert answer["wrong"][2].startswith("wrong: differs from the default by 1.0e-03")
    assert answer["seconds"][2] == []
    assert list(answer["failed"]) == [1]
    assert "no_such" in answer["failed"][1]


def test_one_of_two_servers_is_killed_and_no_result_is_lost(
    tracker: int, tmp_path: Path, target: Any, short: None
) -> None:
    database = tmp_path / "tuning.jsonl"
    module = tvm.IRModule({f"product{n}": product(n) for n in (32, 64)})
    with killed_at_the_first_result(tracker):
        address = f"127.0.0.1:{tracker}"
        found = tune_functions(module, target, 600, database, rpc=address, key="epyc", sizes={"m": 8})
    records, note = read_records(database)
    assert note is None
    assert len(found["lost"]) == 1
    assert {r.status for r in records} == {"ok"}
    screened = [(r.group, r.candidate) for r in records if not r.confirmed]
    assert len(screened) == len(set(screened)) == 2 * 3
    assert found["processors"] == [processor()]
    assert [row["tried"] for row in found["workloads"]] == [3, 3]


def test_addresses_and_instruction_sets_that_cannot_be_used(
    tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, database = tvm.IRModule({"product": product()}), tmp_path / "t.jsonl"
    with silent_port() as port, pytest.raises(InputError, match="No tracker answers"):
        tune_functions(module, target, 1, database, rpc=f"127.0.0.1:{port}")
    old = Facts("An old CPU (1/2)", "attic", "v2", 1, 0)
    monkeypatch.setattr(tune_cpu.GeneratedKernels, "facts", lambda *_: old)
    with pytest.raises(InputError, match="which this processor has not") as error:
        tune_functions(module, target, 600, database)
    assert "An old CPU" in str(error.value)


def test_the_backend_tunes_what_it_generates(
    tmp_path: Path, short: None, invented_times: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isofold.compiler.capture import capture
    from isofold.runtimes.tuning.workloads import Workload
    from isofold.runtimes.tvm import tune_session
    from isofold.runtimes.tvm.plugin import TvmBackend

    told: dict[str, Any] = {}

    def op_library(subject: Any, **options: Any) -> dict[str, Any]:
        told.update(options)
        return {"workloads": [], "measured": 1, "processors": ["a"], "notes": [], "library": "built"}

    monkeypatch.setattr(tune_session, "tune_subject", op_library)
    program = capture(torch.nn.Conv1d(8, 16, 3).eval(), (torch.randn(1, 8, 66),))
    database, other = tmp_path / "tuning.jsonl", tmp_path / "other.jsonl"
    Database(other).add([record_of(cpu_target("tvm-cpu"), product(), {"rows": 3})])
    found = TvmBackend().tune(program, seconds=600, database=database, merge=[other], traces=0)
    assert told == {}, "there is no packed linear"
    assert [row["tried"] for row in found["workloads"]] == [3]
    assert found["merged"] == 1
    assert found["measured"] == len(read_records(database)[0]) - 1 == 3 + 1, "the fastest once more"
    (row,) = found["workloads"]
    assert (row["before"], row["after"], row["ratio"]) == (1e-4, 0.9e-4, 0.9)
    assert row["group"].startswith("schedule_")

    linears = [Workload("linear", 4, 32, 64, 64, 1)]
    monkeypatch.setattr(tune_session, "packed_linears", lambda program, threads: linears)
    again = TvmBackend().tune(program, seconds=600, database=database, traces=0)
    assert told["seconds"] == 300
    assert (again["measured"], again["library"], again["processors"]) == (1, "built", ["a", processor()])
    assert [row["tried"] for row in again["workloads"]] == [3]
