"""MetaSchedule's traces as candidates: invented, measured, kept, resumed, merged, applied again, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch.export import Dim
from tvm import te, tirx
from tvm.s_tir import SBlock

from isofold.compiler.capture import capture
from isofold.compiler.processor import processor
from isofold.compiler.tune_job import show_tuned
from isofold.runtimes.tuning.child import LostError
from isofold.runtimes.tuning.database import Database, Record, read_records
from isofold.runtimes.tuning.machines import Facts, Machine
from isofold.runtimes.tuning.search import InventionError
from isofold.runtimes.tvm import traces, tune_cpu
from isofold.runtimes.tvm.compile_cpu import compile_library, cpu_target, fused
from isofold.runtimes.tvm.executor import Executor
from isofold.runtimes.tvm.lower import lower
from isofold.runtimes.tvm.schedule_cpu import TRACE_FAILED, TUNED, function_key, schedule_cpu, schedule_report
from isofold.runtimes.tvm.schedule_nests import every
from isofold.runtimes.tvm.schedule_traces import (
    Traced,
    TraceError,
    apply_trace,
    number_of,
    representative,
    sizes_of,
)
from isofold.runtimes.tvm.traces import MetaSchedule, Workshop
from isofold.runtimes.tvm.tune_cpu import tune_functions, tuned_schedules
from isofold.runtimes.tvm.tune_worker import arguments_of


@pytest.fixture(scope="module")
def target() -> Any:
    return cpu_target("tvm-cpu")


def pooled(width: int | None = 70) -> tirx.PrimFunc:
    """The largest of five neighbours, twice; a border first. width None: unknown, and how many rows too."""
    n, w = (tirx.Var("n", "int64"), tirx.Var("w", "int64")) if width is None else (3, width)
    x = te.placeholder((n, 6, w), "float32", "x")
    inside = te.compute(
        (n, 6, w + 4),
        lambda b, c, i: tirx.if_then_else(tirx.And(i >= 2, i < w + 2), x(b, c, i - 2), -1e9),
        "padded",
    )
    q = te.reduce_axis((0, 5), "q")
    y = te.compute((n, 6, w), lambda b, c, i: te.max(inside(b, c, i + q), axis=q), "pool")
    return te.create_prim_func([x, te.compute((n, 6, w), lambda b, c, i: y(b, c, i) * 2.0, "y")], "int64")


def expected(x: np.ndarray) -> np.ndarray:
    """What `pooled` computes."""
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2)), constant_values=-1e9)
    return 2 * np.max([padded[..., q : q + x.shape[-1]] for q in range(5)], axis=0)


@pytest.fixture(scope="module")
def workshop() -> Any:
    made = Workshop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def invented(workshop: Workshop, target: Any) -> dict[bool, list[str]]:
    """Traces of `pooled`, with unknown sizes and without."""
    sizes = {"n": 3, "w": 70}
    return {
        unknown: MetaSchedule(workshop, pooled(None if unknown else 70), target, sizes, 128, 2)([], 6)
        for unknown in (False, True)
    }


def run(function: tirx.PrimFunc, target: Any, x: np.ndarray) -> np.ndarray:
    """A scheduled function's result."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    out = tvm.runtime.tensor(np.full_like(x, np.nan))
    tvm.compile(module, target=target)["main"](tvm.runtime.tensor(x), out)
    result: np.ndarray = out.numpy()
    return result


def test_a_representative_has_constant_loops_and_the_same_blocks() -> None:
    function = pooled(None)
    assert set(sizes_of(function)) == {"n", "w"}
    fixed = representative(function, {"n": 3}, 70)
    assert sizes_of(fixed) == {}
    tvm.ir.assert_structural_equal(fixed.body, representative(pooled(None), {"n": 3, "w": 70}, 1).body)
    assert "T.grid(T.int64(3), T.int64(6), T.int64(74))" in fixed.script()
    assert representative(pooled(), {}, 1).same_as(pooled()) or sizes_of(pooled()) == {}


@pytest.mark.parametrize("unknown", [False, True])
def test_traces_compute_the_same_at_any_size(
    invented: dict[bool, list[str]], target: Any, unknown: bool
) -> None:
    texts = invented[unknown]
    assert len(texts) == len(set(texts)) >= 3
    rng = np.random.default_rng(0)
    function = pooled(None if unknown else 70)
    for text in texts:
        module = tvm.IRModule({"f": function})
        scheduled = schedule_cpu(module, target, {function_key(function): Traced(text)})
        assert TUNED in scheduled["f"].attrs
        assert schedule_report(scheduled) == {"f": "a trace of MetaSchedule"}
        if unknown:
            body = apply_trace(function, Traced(text)).mod["main"].body
            outer = [loop for loop in every(body, tirx.For) if loop.kind == tirx.ForKind.PARALLEL]
            inside = sum(len(every(loop.body, SBlock)) for loop in outer)
            assert inside == len(every(body, SBlock)) - 1, "every step in threads, but for the root"
        for n, w in [(3, 70), (1, 1), (5, 33)] if unknown else [(3, 70)]:
            x = rng.standard_normal((n, 6, w)).astype(np.float32)
            assert np.array_equal(run(scheduled["f"], target, x), expected(x))


def test_unknown_sizes_keep_the_tiles_that_were_found(workshop: Workshop, target: Any) -> None:
    m, axis = tirx.Var("m", "int64"), te.reduce_axis((0, 48), "k")
    a, b = te.placeholder((m, 48), "float32", "a"), te.placeholder((48, 64), "float32", "b")
    c = te.compute((m, 64), lambda i, j: te.sum(a(i, axis) * b(axis, j), axis=axis), "c")
    function = te.create_prim_func([a, b, c], "int64")
    texts = MetaSchedule(workshop, function, target, {"m": 32}, 1, 2)([], 8)
    assert len(texts) == 8
    for text in texts:
        # Sampled tiles are the decisions of the trace: rows, then columns, then sums, each from the outside.
        tiles = [tile for _, tile in json.loads(text)[1] if isinstance(tile, list)]
        loops = apply_trace(function, Traced(text))
        extents = [loops.get(loop).extent for loop in loops.get_loops(loops.get_sblock("c_update"))]
        constant = [int(e) for e in extents if isinstance(e, tirx.IntImm)]
        inner = [tile[-1] for tile in tiles[:2]]
        assert constant[-2:] == inner, text
        script = loops.mod["main"].script()
        assert "T.parallel" in script
        assert "meta_schedule" not in script
        assert ("T.vectorized" in script) or inner[1] == 1


def test_what_is_known_is_not_invented_again(
    workshop: Workshop, target: Any, invented: dict[bool, list[str]]
) -> None:
    ask = MetaSchedule(workshop, pooled(), target, {}, 128, 2)
    known = [(text, 1.0 + i) for i, text in enumerate(invented[False])]
    again = ask(known, 4)
    assert not set(again) & set(invented[False])
    assert ask(known, 4) == again, "the seed is what is known"


def test_a_trace_of_another_function_gives_way_to_the_default(
    invented: dict[bool, list[str]], target: Any
) -> None:
    text = invented[False][0]
    x = te.placeholder((40, 40), "float32", "x")
    other = te.create_prim_func([x, te.compute((40, 40), lambda i, j: x(i, j) + 1.0, "z")], "int64")
    for wrong in (text, "[[],", '[[["NoSuch",[],[],[]]],[]]', ""):
        with pytest.raises(TraceError):
            apply_trace(other, Traced(wrong))
        module = schedule_cpu(tvm.IRModule({"f": other}), target, {function_key(other): Traced(wrong)})
        assert TUNED not in module["f"].attrs
        said = schedule_report(module)["f"]
        assert said.startswith(TRACE_FAILED)
        assert said.endswith(schedule_report(schedule_cpu(tvm.IRModule({"f": other}), target))["f"])


@pytest.fixture
def short(invented_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds. What is invented depends on times and on the number of cores: both are always the same."""
    monkeypatch.setattr(tune_cpu, "ROUNDS", 3)
    monkeypatch.setattr(tune_cpu, "CONFIRMING_ROUNDS", 5)

    def facts(kernels: tune_cpu.GeneratedKernels, machine: Machine) -> Facts:
        return Facts(processor(), "here", tune_cpu.isa_of(kernels.target), 2, 0)

    monkeypatch.setattr(tune_cpu.GeneratedKernels, "facts", facts)


def record_of(text: str, function: tirx.PrimFunc, target: Any, **values: Any) -> Record:
    facts: dict[str, Any] = {
        "processor": processor(),
        "isa": tune_cpu.isa_of(target),
        "group": function_key(function),
        "sources": tune_cpu.schedule_sources(),
        "workload": {"sizes": {}, "size": tune_cpu.SIZE},
        "knobs": {"trace": number_of(text)},
        "status": "ok",
        "host": "here",
        "date": "2026-11-28T00:00:00+00:00",
        "confirmed": True,
        "trace": text,
    }
    times = {"seconds": 0.5, "baseline": 1.0, "ratio": 0.5, "noise": 0.01, "rounds": 9}
    return Record(**{**facts, **times, **values})


def traces_in(records: list[Record]) -> dict[int, Record]:
    """A record of each trace."""
    return {r.knobs["trace"]: r for r in records if "trace" in r.knobs}


def test_measuring_being_killed_resuming_and_merging(
    tmp_path: Path, target: Any, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, module = tmp_path / "tuning.jsonl", tvm.IRModule({"pool": pooled()})
    asked: list[int] = []
    whole = Workshop.ask

    def ask(self: Workshop, question: dict[str, Any]) -> dict[str, Any]:
        asked.append(len(question["measured"]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, question)

    monkeypatch.setattr(Workshop, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        tune_functions(module, target, 600, database, traces=6)
    before = read_records(database)[0]
    assert len(traces_in(before)) == asked[1] > 0
    assert all((r.trace is None) == ("trace" not in r.knobs) for r in before), "own parameters too"
    assert all(number_of(r.trace or "") == r.knobs["trace"] for r in traces_in(before).values())

    found = tune_functions(module, target, 600, database, traces=6)
    after = read_records(database)[0]
    assert after[: len(before)] == before
    assert asked[2] == asked[1], "what was measured before the kill is known after it"
    (row,) = found["workloads"]
    assert len(traces_in(after)) >= 6
    assert row["tried"] == len({r.candidate for r in after}) > len(traces_in(after))
    assert {r.status for r in after} == {"ok"}

    other = tmp_path / "other.jsonl"
    assert Database(other).merge(database) == len(after)
    assert tuned_schedules(other, target) == tuned_schedules(database, target)


def test_a_trace_for_unknown_sizes_must_be_right_at_other_sizes_too(
    tmp_path: Path, target: Any, short: None, invented: dict[bool, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    whole = Machine.ask

    def ask(self: Machine, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        asked.append(question)
        return whole(self, question, timeout)

    monkeypatch.setattr(Machine, "ask", ask)
    monkeypatch.setattr(Workshop, "ask", lambda self, question: {"traces": invented[True][:1]})
    module, database = tvm.IRModule({"pool": pooled(None)}), tmp_path / "tuning.jsonl"
    tune_functions(module, target, 600, database, sizes={"n": 3, "w": 70}, traces=1)
    assert {json.dumps(q["smaller"], sort_keys=True) for q in asked} == {'{"n": 3, "w": 47}'}
    (record,) = {r.candidate: r for r in read_records(database)[0] if r.trace}.values()
    assert (record.status, record.workload["sizes"]) == ("ok", {"n": 3, "w": 70})


@pytest.mark.parametrize(
    "values", [{"processor": "another"}, {"sources": "0" * 16}, {"confirmed": False}, {"status": "wrong"}]
)
def test_traces_of_another_machine_or_version_do_not_count(
    tmp_path: Path, target: Any, invented: dict[bool, list[str]], values: dict[str, Any]
) -> None:
    database, text = tmp_path / "tuning.jsonl", invented[False][0]
    Database(database).add([record_of(text, pooled(), target)])
    assert tuned_schedules(database, target) == {function_key(pooled()): Traced(text)}
    database.unlink()
    Database(database).add([record_of(text, pooled(), target, **values)])
    assert tuned_schedules(database, target) == {}


def test_compiling_applies_what_the_database_has_and_says_what_it_could_not(
    tmp_path: Path, target: Any, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(torch.nn.AvgPool1d(4, 4).eval(), (torch.randn(2, 6, 64),))
    lowered = lower(program).module
    ((name, function),) = [
        (str(g.name_hint), f)
        for g, f in fused(lowered, target).functions.items()
        if isinstance(f, tirx.PrimFunc)
    ]
    (text,) = MetaSchedule(workshop, function, target, {}, 1, 2)([], 1)
    monkeypatch.setattr(tune_cpu, "database_path", lambda: tmp_path / "tuning.jsonl")
    Database(tmp_path / "tuning.jsonl").add([record_of(text, function, target)])
    facts = compile_library(lowered, target, tmp_path / "model.so")
    assert (facts["tuned"], facts["trace_failed"]) == (1, [])
    assert facts["schedules"][name] == "a trace of MetaSchedule"
    x = torch.randn(2, 6, 64)
    (got,) = Executor(tmp_path / "model.so", {}).run([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(np.array(got)), torch.nn.functional.avg_pool1d(x, 4, 4))

    (tmp_path / "tuning.jsonl").unlink()
    Database(tmp_path / "tuning.jsonl").add([record_of("[[],[1]]", function, target)])
    facts = compile_library(lowered, target, tmp_path / "other.so")
    assert (facts["tuned"], facts["trace_failed"]) == (0, [name])
    assert facts["schedules"][name].startswith(TRACE_FAILED)


def test_the_summary_names_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"workload": "pool", "group": "schedule_0", "isa": "v4", "tried": 9, "before": 2e-4, "after": 1e-5}
    row |= {"ratio": 0.05, "noise": 0.001, "knobs": {"trace": 17}, "invented": True}
    result = {"workloads": [row], "processors": ["a"], "notes": [], "lost": [], "merged": 0, "measured": 9}
    show_tuned({**result, "database": "t.jsonl", "seconds": 3.0, "library": None})
    said = capsys.readouterr()
    assert "MetaSchedule's schedule" in " ".join((said.out + said.err).split())


def test_what_hangs_or_crashes_costs_the_search_its_inventor(
    tmp_path: Path, target: Any, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Child:
        def __init__(self, module: str) -> None:
            del module

        def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
            raise LostError("its process ended with code -11")

        def close(self) -> None:
            pass

    monkeypatch.setattr(traces, "Child", Child)
    found = tune_functions(tvm.IRModule({"pool": pooled()}), target, 600, tmp_path / "t.jsonl")
    (note,) = found["notes"]
    assert note == ("pool: nothing more is invented: MetaSchedule was lost: its process ended with code -11")
    records = read_records(tmp_path / "t.jsonl")[0]
    assert found["workloads"][0]["tried"] == len({r.candidate for r in records}) > 1
    assert [r for r in records if r.trace] == []


def test_the_workers_own_errors_name_the_cause(target: Any) -> None:
    workshop = Workshop()
    try:
        with pytest.raises(InventionError, match="MetaSchedule cannot schedule it: "):
            workshop.ask({"function": json.dumps("nothing"), "target": tvm.ir.save_json(target)})
    finally:
        workshop.close()


def test_kernels_are_measured_at_the_sizes_of_the_programs_example(target: Any) -> None:
    half = Dim("half", min=2, max=64)
    module = torch.nn.Conv2d(4, 16, 3, stride=2, padding=1).eval()
    program = capture(
        module, (torch.randn(2, 4, 10, 70),), None, ({0: Dim("b"), 2: 2 * half, 3: 2 * Dim("w")},)
    )
    lowered = fused(lower(program).module, target)
    sizes = tune_cpu.example_sizes(program)
    ((name, (call,)),) = [(n, c) for n, c in tune_cpu.calls_of(lowered).items() if "conv2d" in n]
    function = lowered[name]
    found = tune_cpu.sizes_in(function, [call], sizes)
    assert found.keys() == sizes_of(function).keys()
    x, *_, y = arguments_of(function, found, 0)
    assert not isinstance(x, int)
    assert not isinstance(y, int)
    assert (x.shape, y.shape) == ((2, 4, 10, 70), (2, 16, 5, 35))
    units = [v for n, v in found.items() if n.startswith("size")]
    assert units == [3], "vectors of sixteen results in a row of 35"
    fewer = tune_cpu.sizes_in(function, [call], tune_cpu.smaller(sizes))
    assert 16 * fewer[next(n for n in fewer if n.startswith("size"))] >= 23, (
        "what follows from others, follows"
    )
