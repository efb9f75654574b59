"""Artefact folders: written once, opened without torch, damage and misuse reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from isofold.compiler.artefact import MANIFEST
from isofold.compiler.capture import capture
from isofold.compiler.errors import ArtefactError, InputError
from isofold.compiler.program import Program
from isofold.compiler.registry import backend_for
from isofold.runtimes.onnx.artefact import write_artefact, write_onnx
from isofold.runtimes.onnx.session import OnnxModel, open_artefact

from .test_export import program_of_packed


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.out = nn.Linear(32, 16)

    def forward(self, ids: Tensor, mask: Tensor, flag: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.out(self.table(ids) * mask[..., None])
        return hidden, {"sum": hidden.sum(1)}


def program() -> Program:
    batch, length = Dim("batch", min=1, max=32), Dim("length", min=1, max=64)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, None)
    return capture(TwoInputs().eval(), (torch.arange(10).reshape(2, 5), torch.ones(2, 5), True), None, shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    folder = tmp_path_factory.mktemp("artefact")
    torch.manual_seed(0)
    made = program()
    write_artefact(made, folder, report={"layers": []}, library=False)
    return folder, made


@pytest.fixture
def folder(written: tuple[Path, Program], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written[0], tmp_path / "artefact"))


@pytest.fixture(scope="module")
def model(written: tuple[Path, Program]) -> OnnxModel:
    return open_artefact(written[0])


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, library: str) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_artefact(program_of_packed(), folder, report={})
    return folder


def test_results_have_the_structure_of_the_module(model: OnnxModel, written: tuple[Path, Program]) -> None:
    ids, mask = torch.arange(21).reshape(3, 7), torch.rand(3, 7)
    want = written[1](ids, mask, True)
    for got in (model(ids, mask), model(ids, mask=mask), model(mask=mask, ids=ids, flag=True)):
        assert isinstance(got, tuple)
        assert list(got[1]) == ["sum"]
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1]["sum"], want[1]["sum"], rtol=1e-5, atol=1e-5)
    arrays = model(ids.numpy(), mask.numpy())
    assert isinstance(arrays[0], np.ndarray)
    np.testing.assert_array_equal(arrays[0], got[0].numpy())


def test_ports_say_what_goes_in_and_out(model: OnnxModel) -> None:
    assert [(p.name, p.dtype, p.shape) for p in model.inputs] == [
        ("ids", "int64", ("batch", "length")),
        ("mask", "float32", ("batch", "length")),
    ]
    assert [(p.name, p.shape) for p in model.outputs] == [
        ("output_0", ("batch", "length", 16)),
        ("output_1_sum", ("batch", 16)),
    ]


def test_every_misfit_is_listed_at_once(model: OnnxModel) -> None:
    with pytest.raises(InputError) as caught:
        model(np.zeros((2, 3), np.int32), np.zeros((2, 4), np.float32))
    assert "ids: expected int64, got int32" in str(caught.value)
    assert "mask: length is 4, but 3 in ids" in str(caught.value)
    with pytest.raises(InputError, match=r"ids: expected shape \[batch, length\], got \[4\]"):
        model(np.zeros(4, np.int64), np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match="ids: expected an array, got list"):
        model([1, 2], np.zeros((2, 4), np.float32))


def test_wrong_arguments_are_listed_at_once(model: OnnxModel) -> None:
    ids = np.zeros((2, 3), np.int64)
    with pytest.raises(InputError, match="unknown: other; missing: mask"):
        model(ids, other=ids)
    with pytest.raises(InputError, match="given twice: ids"):
        model(ids, ids=ids)
    with pytest.raises(InputError, match="4 positional arguments for 3"):
        model(ids, ids, True, ids)
    with pytest.raises(InputError, match="Argument flag was fixed when the model was compiled"):
        model(ids, np.ones((2, 3), np.float32), False)


def test_failure_inside_the_runtime_names_the_inputs(model: OnnxModel) -> None:
    with pytest.raises(InputError, match=r"ONNX Runtime failed on these inputs(.|\n)*ids \[1, 1\]"):
        model(np.array([[99]]), np.ones((1, 1), np.float32))


def test_benchmark_and_profile_measure_the_examples(model: OnnxModel) -> None:
    timed = model.benchmark(runs=5, warmup=1, threads=1)
    assert 0 < timed["min_ms"] <= timed["q1_ms"] <= timed["median_ms"] <= timed["q3_ms"]
    assert timed["threads"] == 1
    nodes = model.profile(runs=3)
    assert {"Gather"} <= {n["op"] for n in nodes}
    assert all(n["microseconds"] >= 0 for n in nodes)
    with pytest.raises(InputError, match="A benchmark needs runs"):
        model.benchmark(runs=0)


def test_profile_names_packed_operators_like_the_program(packed_folder: Path) -> None:
    names = {n["name"]: n["op"] for n in open_artefact(packed_folder).profile(runs=2)}
    assert names["linear_packed"] == "PackedLinear"
    assert names["linear_packed_float"] == "PackedLinearFloat"


def test_three_lines_of_plain_onnxruntime_open_an_artefact(packed_folder: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(packed_folder / "libisofold_ops.so"))
    session = onnxruntime.InferenceSession(str(packed_folder / "model.onnx"), options)
    stock = onnxruntime.InferenceSession(str(packed_folder / "model.onnx"))
    feed = open_artefact(packed_folder).examples()
    for native, plain in zip(session.run(None, feed), stock.run(None, feed), strict=True):
        np.testing.assert_allclose(native, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


def test_opens_and_runs_without_torch(packed_folder: Path) -> None:
    code = (
        "import sys, isofold\n"
        f"model = isofold.load({str(packed_folder)!r})\n"
        "feed = model.examples()\n"
        "result = model(feed['x'], shift=feed['shift'])\n"
        "model.report, model.benchmark(runs=2), model.profile(runs=1)\n"
        "assert type(result['count']) is int and result['pair'][1][1] is None\n"
        "loaded = {'torch', 'onnx', 'transformers', 'tvm'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "print(result['pair'][0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4, 3)"


def test_artefact_is_the_same_every_time(packed_folder: Path, tmp_path: Path) -> None:
    write_artefact(program_of_packed(), tmp_path, report={})
    for path in packed_folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_save_copies_everything(model: OnnxModel, tmp_path: Path) -> None:
    model.save(tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == sorted(os.listdir(model.folder))
    open_artefact(tmp_path / "copy", verify=True)
    with pytest.raises(ArtefactError, match="exists already"):
        model.save(tmp_path / "copy")


def test_truncated_weights_are_found(folder: Path) -> None:
    path = folder / "weights.bin"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(
        ArtefactError, match=f"weights.bin is truncated: {size - 100} bytes instead of {size}"
    ):
        open_artefact(folder)


def test_all_missing_files_are_listed(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    (folder / "model.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"model\.onnx is missing; weights\.bin is missing"):
        open_artefact(folder)


def test_changed_content_is_found_when_asked(folder: Path) -> None:
    path = folder / "weights.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    open_artefact(folder)
    with pytest.raises(ArtefactError, match=r"weights\.bin has another content than was written"):
        open_artefact(folder, verify=True)


def test_damaged_graph_is_an_error(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ArtefactError, match=r"cannot open the model(.|\n)*need ONNX Runtime 1\.28"):
        open_artefact(folder)


def test_newer_format_and_damaged_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99, "isofold": "9.0"}))
    with pytest.raises(ArtefactError, match=r"written by a newer isofold(.|\n)*isofold 9.0(.|\n)*upgrade"):
        open_artefact(folder)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ArtefactError, match="manifest is damaged"):
        open_artefact(folder)


def test_bad_options_are_errors(folder: Path) -> None:
    with pytest.raises(InputError, match="Threads must be positive"):
        open_artefact(folder, threads=0)
    with pytest.raises(InputError, match="no such op library"):
        open_artefact(folder, library=folder / "nothing.so")
    with pytest.raises(ArtefactError, match="cannot load the op library"):
        open_artefact(folder, library=folder / "weights.bin")
    with pytest.raises(InputError, match=r"Unknown option 'libary'(.|\n)*did you mean 'library'"):
        backend_for("cpu").write(program(), folder, report={}, libary=False)


def test_single_file_replaces_an_old_one_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "model.onnx"
    report: dict[str, object] = {}
    write_onnx(program(), path, report=report, library=False)
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "model.onnx.data"]
    assert report["onnx"]
    onnxruntime.InferenceSession(str(path))
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("isofold.runtimes.onnx.artefact.check_results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_onnx(program(), path, report={}, library=False)
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "model.onnx.data"]
    assert path.read_bytes() == before


def test_inputs_captured_by_keyword_may_be_given_by_position(tmp_path: Path) -> None:
    class Difference(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - 2 * b

    a, b = torch.randn(3), torch.randn(3)
    write_artefact(capture(Difference(), kwargs={"a": a, "b": b}), tmp_path, report={}, library=False)
    opened = open_artefact(tmp_path)
    for got in (opened(a, b), opened(a, b=b), opened(b=b, a=a)):
        torch.testing.assert_close(got, a - 2 * b)
