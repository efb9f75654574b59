"""Tuning of generated kernels: records persist, resume and merge; what is chosen computes the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import te, tirx

from isofold.compiler.errors import InputError
from isofold.runtimes.tuning.child import LostError
from isofold.runtimes.tuning.database import Database, read_records
from isofold.runtimes.tvm import tune_cpu
from isofold.runtimes.tvm.compile_cpu import cpu_target
from isofold.runtimes.tvm.schedule_cpu import function_key, schedule_cpu, schedule_report
from isofold.runtimes.tvm.schedule_rules import Shape
from isofold.runtimes.tvm.tune_cpu import candidates, tune_functions, tuned_shapes


@pytest.fixture
def target() -> Any:
    return cpu_target("tvm-cpu")


def product(n: int = 64) -> tirx.PrimFunc:
    m = tirx.Var("m", "int64")
    axis = te.reduce_axis((0, 48), "k")
    a, b = te.placeholder((m, 48), "float32", "a"), te.placeholder((48, n), "float32", "b")
    c = te.compute((m, n), lambda i, j: te.sum(a(i, axis) * b(axis, j), axis=axis), "c")
    return te.create_prim_func([a, b, c], "int64")


def copy() -> tirx.PrimFunc:
    x = te.placeholder((300, 300), "float32", "x")
    return te.create_prim_func([x, te.compute((300, 300), lambda i, j: x(i, j) * 2.0, "y")], "int64")


def compiled(module: tvm.IRModule, name: str, target: Any) -> Any:
    function = module[name].with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]


def test_candidates_change_what_the_rules_depend_on(target: Any) -> None:
    default = Shape.of(target)
    found = list(candidates(product(), target))
    assert all(set(c) == {"rows", "columns"} for c in found)
    assert {"rows": default.rows, "columns": default.columns} not in found
    assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found) > 4
    assert list(candidates(copy(), target)) == []


def test_measuring_resuming_and_using(tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "tuning.jsonl"
    module = tvm.IRModule({"product": product(), "same": product(), "copy": copy()})
    monkeypatch.setattr(tune_cpu, "ROUNDS", 3)
    few = [{"rows": 2}, {"columns": 16}]
    monkeypatch.setattr(tune_cpu, "candidates", lambda f, t: few)
    said: list[str] = []
    found = tune_functions(module, target, 600, database, progress=said.append, sizes={"m": 40})
    assert len(found) == 2  # equal functions are one
    assert len(said) >= 4
    assert all(t.before and t.after for t in found), found
    assert all(t.candidates >= 2 for t in found), said
    lines = read_records(database)[0]
    assert {r.group for r in lines} == {function_key(product()), function_key(copy())}
    assert all(r.status == "ok" and r.workload == {"sizes": {"m": 40}, "size": tune_cpu.SIZE} for r in lines)

    def no_child(*_: Any) -> Any:
        raise AssertionError("everything was measured before")

    monkeypatch.setattr(tune_cpu, "Child", no_child)
    again = tune_functions(module, target, 60, database, sizes={"m": 40})
    assert [t.candidates for t in again] == [0, 0]
    assert [t.before for t in again] == [t.before for t in found]


def record_of(target: Any, function: tirx.PrimFunc, change: dict[str, int], **values: Any) -> Any:
    empty = tune_cpu._record(function_key(function), target, change, True, {})
    return replace(
        empty, **{"seconds": 0.5, "baseline": 1.0, "ratio": 0.5, "noise": 0.01, "rounds": 9, **values}
    )


def test_what_is_chosen_computes_the_same(tmp_path: Path, target: Any) -> None:
    database = tmp_path / "tuning.jsonl"
    Database(database).add([record_of(target, product(), {"rows": 3, "columns": 16})])
    shapes = tuned_shapes(database, target)
    module = tvm.IRModule({"product": product()})
    default, tuned = schedule_cpu(module, target), schedule_cpu(module, target, shapes)
    assert "16 neighbouring results, 3 rows" in schedule_report(tuned)["product"]
    assert schedule_report(default) != schedule_report(tuned)
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
    assert tuned_shapes(database, target) == {}


def test_merging_and_a_cut_line(tmp_path: Path, target: Any) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    Database(two).add([record_of(target, product(), {"rows": 3})])
    two.write_bytes(two.read_bytes() + b'{"v":1,"proc')
    assert Database(one).merge(two) == 1
    assert list(tuned_shapes(one, target).values()) == [replace(Shape.of(target), rows=3)]
    assert tuned_shapes(two, target) == tuned_shapes(one, target)
    assert tuned_shapes(tmp_path / "none.jsonl", target) == {}


def test_a_lost_worker_is_recorded_and_the_search_goes_on(
    tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, int]] = []

    class Falling:
        def __init__(self, module: str) -> None:
            pass

        def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
            asked.append(question["change"])
            raise LostError("its process ended with code -11")

        def close(self) -> None:
            pass

    monkeypatch.setattr(tune_cpu, "Child", Falling)
    monkeypatch.setattr(tune_cpu, "candidates", lambda f, t: [{"rows": 2}, {"rows": 3}])
    database = tmp_path / "tuning.jsonl"
    found = tune_functions(tvm.IRModule({"product": product()}), target, 60, database)
    records = read_records(database)[0]
    assert {r.status for r in records} == {"crashed"}
    assert {json.dumps(r.knobs) for r in records} == {'{"rows": 2}', '{"rows": 3}'}
    assert found[0].shape == Shape.of(target)
    assert tuned_shapes(database, target) == {}


def test_a_wrong_result_is_found(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from isofold.runtimes.tvm import tune_worker

    whole = tune_worker._compiled

    def broken(function: Any, target: Any, shape: Shape) -> Any:
        run = whole(function, target, shape)
        if shape == Shape.of(target):
            return run

        def add(*args: Any) -> None:
            run(*args)
            args[-1].copyfrom(args[-1].numpy() + 1)

        return add

    monkeypatch.setattr(tune_worker, "_compiled", broken)
    question = {
        "function": tvm.ir.save_json(product()),
        "target": tvm.ir.save_json(target),
        "change": {"rows": 2},
        "rounds": 2,
        "sizes": {},
        "size": 16,
    }
    assert tune_worker._answer(question)["wrong"][2].startswith("wrong: differs from the default")


def test_over_rpc_is_refused(tmp_path: Path, target: Any) -> None:
    with pytest.raises(InputError, match="tuned on this machine only"):
        tune_functions(tvm.IRModule({}), target, 1, tmp_path / "t.jsonl", rpc="host:9190")


def test_the_backend_tunes_what_it_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isofold.compiler.capture import capture
    from isofold.runtimes.tuning import session
    from isofold.runtimes.tvm.plugin import TvmBackend

    told: dict[str, Any] = {}

    def op_library(subject: Any, **options: Any) -> dict[str, Any]:
        told.update(options)
        return {"workloads": [], "measured": 0}

    monkeypatch.setattr(session, "tune_subject", op_library)
    monkeypatch.setattr(tune_cpu, "ROUNDS", 3)
    monkeypatch.setattr(tune_cpu, "candidates", lambda f, t: [{"rows": 2}])
    program = capture(torch.nn.Conv1d(8, 16, 3).eval(), (torch.randn(1, 8, 66),))
    database = tmp_path / "tuning.jsonl"
    found = TvmBackend().tune(program, seconds=600, database=database)
    assert told["seconds"] == 300
    assert [row["tried"] >= 1 for row in found["workloads"]] == [True]
    assert found["measured"] == len(read_records(database)[0])
    row = found["workloads"][0]
    assert row["before"] > 0
    assert row["group"].startswith("schedule_")
