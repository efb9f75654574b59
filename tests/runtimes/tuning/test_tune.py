"""Tuning runs of seconds: real kernels, kills in the middle, lost servers, the command line as users type it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import isofold
from isofold.compiler.cli import app
from isofold.compiler.errors import InputError
from isofold.compiler.processor import processor
from isofold.compiler.tune_job import duration
from isofold.runtimes.tuning import session
from isofold.runtimes.tuning.database import Database, read_records
from isofold.runtimes.tuning.tune import tune
from isofold.runtimes.tuning.workloads import Workload

from ...processes import PATIENCE, ended, interruptible, silent_port, wait_until
from ..lent_machines import killed_at_the_first_result, tracker
from .conftest import FEW, SMALL, record

__all__ = ["tracker"]

SCRIPT = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from isofold.runtimes.tuning.tune import tune
from isofold.runtimes.tuning.workloads import Workload
few = {{"stream_near": (0, 2048), "stream_far": (16384,), "stream_far_level": (2,)}}
few |= {{"scales_ahead": (0,), "gemv_panels": (1, 2, 4)}}
shapes = [Workload("linear", 4, 32, 256, 96, m, cold=False) for m in (1, 2)]
tune(shapes, seconds={PATIENCE}, database=Path(sys.argv[1]), values=few)
print("done")
"""


def has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def test_two_values_are_measured_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "db.jsonl"
    result = tune([SMALL], seconds=PATIENCE, database=path, values=FEW, say=said.append)
    records, _ = read_records(path)
    screened = [r for r in records if not r.confirmed]
    assert [r.knobs["gemv_panels"] for r in screened] == [2]
    assert records[0].status == "ok"
    assert records[0].processor == processor()
    assert 1e-7 < (records[0].seconds or 0) < 1e-2
    assert result["measured"] == len(records)
    assert result["seconds"] < PATIENCE, "it ends when nothing is left to measure"
    (row,) = result["workloads"]
    assert row["workload"] == "linear w4g32 256x96 m1 t1 cached"
    assert row["before"] > 0
    assert any("1 of" in text or "0 of" in text for text in said)
    strange = [replace(r, processor="Other (3/4)") for r in records] + [replace(records[0], sources="0")]
    Database(path).add(strange)
    again = tune([SMALL], seconds=PATIENCE, database=path, values=FEW)
    assert again["measured"] == 0
    assert read_records(path)[0] == [*records, *strange]
    assert f"{len(records)} results of other processors (Other (3/4)) are kept" in again["notes"][0]
    assert "1 results of another version of the kernels" in again["notes"][1]


def test_kill_9_in_the_middle_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "db.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(path)]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE)) as running:
        wait_until(lambda: has_content(path), running)
        os.kill(running.pid, signal.SIGKILL)
    before, _ = read_records(path)
    assert before
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE, check=True)
    assert done.stdout == b"done\n"
    after, note = read_records(path)
    assert note is None
    assert after[: len(before)] == before
    keys = [r.key for r in after]
    assert len(set(keys)) == len(keys)
    assert len([r for r in after if not r.confirmed]) == (2 * 3 - 1) * 2


def test_one_of_two_servers_is_killed_and_no_result_is_lost(tracker: int, tmp_path: Path) -> None:
    path = tmp_path / "db.jsonl"
    address = f"127.0.0.1:{tracker}"
    values = {
        "stream_near": (0, 2048),
        "stream_far": (16384,),
        "stream_far_level": (2,),
        "scales_ahead": (0,),
    }
    shapes = [Workload("linear", 4, 32, 256, 96, m, cold=False) for m in (1, 2)]
    with killed_at_the_first_result(tracker):
        result = tune(shapes, seconds=PATIENCE, database=path, rpc=address, key="epyc", values=values)
    records, note = read_records(path)
    assert note is None
    assert len(result["lost"]) == 1
    assert {r.status for r in records} == {"ok"}
    assert len([r for r in records if not r.confirmed]) == (2 * 3 - 1) * 2
    assert result["processors"] == [processor()]


def error_of(*words: str) -> str:
    done = CliRunner().invoke(app, ["tune", *words, "--quiet"])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    return done.stderr


def test_addresses_that_answer_nothing_are_explained(tracker: int) -> None:
    assert "HOST:PORT, such as tuner:9190" in error_of("--rpc", "tuner")
    text = error_of("--rpc", "no-such-host.invalid:9190")
    assert "No tracker answers" in text
    assert "no-such-host.invalid" in text
    assert "python -m tvm.exec.rpc_tracker" in text
    with silent_port() as port:
        assert "No tracker answers" in error_of("--rpc", f"127.0.0.1:{port}")
    text = error_of("--rpc", f"127.0.0.1:{tracker}", "--key", "nobody")
    assert "No server is registered under this key" in text
    assert f"python -m tvm.exec.rpc_server --tracker 127.0.0.1:{tracker} --key nobody" in text


def test_other_mistakes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "such as 90s, 10m, 1h30m" in error_of("--time", "soon")
    assert "v3 | v4" in error_of("--isa", "v9")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("nonsense\n")
    text = error_of("--database", str(damaged), "--time", "1s")
    assert f"{damaged}, line 1" in text
    assert "cannot be read" in error_of("--merge", str(tmp_path / "none.jsonl"))
    monkeypatch.setenv("CXX", "no-such-g++")
    from isofold.runtimes.onnx.oplib import build

    build._compiler_version.cache_clear()
    try:
        text = error_of("--time", "1s", "--database", str(tmp_path / "db.jsonl"))
    finally:
        build._compiler_version.cache_clear()
    assert "no the C++ compiler (no-such-g++)" in text
    assert "apt-get install g++" in text


def test_merging_from_the_command_line(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    Database(theirs).add([record(), record(isa="v3")])
    words = ["tune", "--merge", str(theirs), "--database", str(ours), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["merged"], result["measured"], result["library"]) == (2, 0, None)
    assert Database(ours).records == Database(theirs).records


def test_durations() -> None:
    assert [duration(text) for text in ("90", "90s", "10m", "1h30m", "1m5s", 7)] == [90, 90, 600, 5400, 65, 7]
    for bad in ("", "m", "soon", "-3", "1d", -1):
        with pytest.raises(InputError, match="no duration"):
            duration(bad)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 96)
        self.down = torch.nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_a_models_own_linears_are_tuned_for_as_long_as_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Workload] = []

    def seen(workloads: list[Workload], **options: Any) -> dict[str, Any]:
        asked.extend(workloads)
        return tune(workloads, **options)

    monkeypatch.setattr(session, "tune", seen)
    result = isofold.tune(
        Net(), (torch.randn(3, 64),), recipe="w8a8", time=1, threads=1, database=tmp_path / "db.jsonl"
    )
    names = {"linear w8 64x96 m3 t1", "linear w8 96x64 m3 t1"}
    assert {workload.name for workload in asked} == names
    assert {row["workload"] for row in result["workloads"]} <= names, "none where a second is too short"
    assert result["library"] is None


@pytest.mark.usefixtures("common_cache")
def test_an_artefacts_linears_are_found_with_their_rows(tmp_path: Path) -> None:
    from isofold.runtimes.tuning.subjects import workloads_of_artefact

    for recipe, names in {
        "w8a8": {"linear w8 64x96 m6 t2", "linear w8 96x64 m6 t2"},
        "w4a16": {"linear_float w4g32 64x96 m6 t2", "linear_float w4g32 96x64 m6 t2"},
    }.items():
        folder = tmp_path / recipe
        isofold.compile(
            Net(), (torch.randn(2, 3, 64),), recipe=recipe, output=folder, verify=False, measure=False
        )
        assert {w.name for w in workloads_of_artefact(folder, 2)} == names


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "db.jsonl"
    words = ["isofold", "tune", "--time", "20m", "--threads", "1", "--database", str(path)]
    with interruptible():
        running = subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.PIPE, text=True)
    with ended(running):
        wait_until(lambda: has_content(path), running)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130, said
    assert "what was measured is kept" in said
    assert "Traceback" not in said
    assert read_records(path)[1] is None
    assert read_records(path)[0]


def test_a_model_without_quantized_linears_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no packed linear to tune"):
        isofold.tune(Net(), (torch.randn(3, 64),), recipe="float32", time=1, database=tmp_path / "db.jsonl")
