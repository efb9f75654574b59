"""Artefacts: written, opened without torch and without TVM's compiler, run from C++, refused when damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import isofold
from isofold.compiler.errors import ArtefactError, InputError
from isofold.compiler.tensor_file import read_tensors, write_tensors
from isofold.models import registry
from isofold.runtimes.tvm.executor import runtime_library

pytestmark = pytest.mark.usefixtures("objects")


@pytest.fixture(scope="module")
def compiled(objects: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    case = registry.get("llama")
    folder = tmp_path_factory.mktemp("artefact") / "llama"
    return isofold.compile(
        case.module,
        case.args,
        target="tvm-cpu",
        recipe="w8a8",
        dynamic_shapes=case.dynamic_shapes,
        output=folder,
    )


def test_the_artefact_says_what_it_is(compiled: Any) -> None:
    manifest = json.loads((compiled.folder / "isofold.json").read_text())
    assert (manifest["backend"], manifest["target"]) == ("tvm", "tvm-cpu")
    assert set(manifest["files"]) == {"model.so", "weights.safetensors"}
    facts = compiled.report["tvm"]
    assert facts["fallbacks"] == {}
    assert facts["results"]["error"] <= facts["results"]["bound"]
    assert (compiled.folder / "report.html").is_file()


def test_profiles_name_the_programs_nodes(compiled: Any) -> None:
    names = {entry["name"] for entry in compiled.profile(runs=2)}
    packed = {layer["packed"] for layer in compiled.report["layers"] if layer.get("packed")}
    assert packed
    assert packed <= names
    assert compiled.report["profile"]["total_microseconds"] > 0


def test_other_thread_counts_compute_the_same(compiled: Any) -> None:
    case = registry.get("llama")
    expected = compiled(*case.other_args)
    for threads in (1, 2):
        opened = isofold.load(compiled.folder, threads=threads)
        assert torch.equal(opened(*case.other_args), expected)
        assert opened.benchmark(runs=3, warmup=1)["threads"] == threads
    assert compiled.benchmark(runs=2, warmup=1, threads=1)["threads"] == 1


LOADED = """
import sys
import numpy as np
import isofold

model = isofold.load(sys.argv[1])
inputs = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **model.run(inputs))
loaded = [line.split()[-1] for line in open("/proc/self/maps") if "/" in line]
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "tvm", "onnxruntime")], "imported"
assert not [path for path in loaded if "libtorch" in path or "libtvm_compiler" in path], "mapped"
assert any("libtvm_runtime" in path for path in loaded)
import torch  # comes in later without harm
assert torch.ones(2).sum() == 2
"""


def test_loading_needs_neither_torch_nor_the_compiler(compiled: Any, tmp_path: Path) -> None:
    case = registry.get("llama")
    inputs = dict(zip([p.name for p in compiled.inputs], [a.numpy() for a in case.other_args], strict=True))
    np.savez(tmp_path / "in.npz", **inputs)
    command = [
        sys.executable,
        "-c",
        LOADED,
        str(compiled.folder),
        str(tmp_path / "in.npz"),
        str(tmp_path / "out.npz"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    for name, array in compiled.run(inputs).items():
        assert np.array_equal(found[name], array)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cpp_example_computes_the_same(compiled: Any, root: Path, tmp_path: Path) -> None:
    spec = find_spec("tvm_ffi")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    ffi, tvm = Path(next(iter(spec.submodule_search_locations))), runtime_library().parent
    program = tmp_path / "run_artefact"
    source = root / "examples/tvm/run_artefact.cc"
    libraries = [f"-L{ffi}/lib", f"-L{tvm}", "-ltvm_ffi", "-Wl,--no-as-needed", "-ltvm_runtime"]
    places = [f"-Wl,-rpath,{ffi}/lib", f"-Wl,-rpath,{tvm}"]
    built = [
        "g++",
        "-std=c++17",
        "-O1",
        str(source),
        f"-I{ffi}/include",
        *libraries,
        *places,
        "-o",
        str(program),
    ]
    subprocess.run(built, check=True, capture_output=True)
    case = registry.get("llama")
    inputs = {
        p.name: np.ascontiguousarray(a.numpy()) for p, a in zip(compiled.inputs, case.other_args, strict=True)
    }
    with (tmp_path / "in.safetensors").open("wb") as file:
        write_tensors(file, [(n, a.dtype.name, a.shape, a.tobytes()) for n, a in inputs.items()])
    command = [str(program), str(compiled.folder), str(tmp_path / "in.safetensors")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for line, expected in zip(lines, compiled.run(inputs).values(), strict=True):
        head, _, values = line.partition(":")
        assert head.partition(" ")[2] == str(list(expected.shape))
        assert np.array_equal(np.array(values.split(), np.float32), expected.reshape(-1))
    missing = subprocess.run([str(program), str(tmp_path), "nothing"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "model.so" in missing.stderr


def test_save_and_load_again(compiled: Any, tmp_path: Path) -> None:
    compiled.save(tmp_path / "copy")
    case = registry.get("llama")
    again = isofold.load(tmp_path / "copy", verify=True)
    assert torch.equal(again(*case.args), compiled(*case.args))


def test_weights_are_mapped_at_boundaries_and_not_copied(compiled: Any) -> None:
    arrays = read_tensors(compiled.folder / "weights.safetensors")
    assert arrays
    assert all(array.ctypes.data % 64 == 0 for array in arrays.values())
    assert all(array.ctypes.data % 4096 == 0 for array in arrays.values() if array.nbytes >= 65536)


def test_the_file_of_weights_is_safetensors(compiled: Any) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = compiled.folder / "weights.safetensors"
    stored = safetensors.load_file(path)
    for name, array in read_tensors(path).items():
        assert np.array_equal(stored[name], array)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x)) + x[..., :8]


@pytest.mark.parametrize("target", ["llvm", "llvm:x86-64-v3"])
def test_explicit_targets_and_single_files(target: str, tmp_path: Path) -> None:
    module, x = Small(), torch.randn(3, 16)
    path = tmp_path / "model.so"
    report = isofold.export(module, path, (x,), target=target, recipe="float32")
    assert report["tvm"]["features"] in ("x86-64-v3", "x86-64-v4")
    assert {p.name for p in tmp_path.iterdir()} == {"model.so", "model.so.data"}
    before = path.read_bytes(), path.with_name("model.so.data").read_bytes()
    isofold.export(module, path, (x,), target=target, recipe="float32")
    assert (
        path.read_bytes(),
        path.with_name("model.so.data").read_bytes(),
    ) == before  # the same program, the same bytes


def test_bad_requests(compiled: Any, tmp_path: Path) -> None:
    module, x = Small(), torch.randn(3, 16)
    with pytest.raises(InputError, match=r"Unknown instruction set in the target 'llvm:x86-64-v9'"):
        isofold.compile(module, (x,), target="llvm:x86-64-v9", recipe="float32")
    with pytest.raises(InputError, match=r"Unknown option 'chek' of the TVM backend"):
        isofold.compile(module, (x,), target="tvm-cpu", recipe="float32", chek=False)
    with pytest.raises(ArtefactError, match=r"a path that ends in .so"):
        isofold.export(module, tmp_path / "m.onnx", (x,), target="tvm-cpu")
    with pytest.raises(InputError, match="Threads must be positive"):
        isofold.load(compiled.folder, threads=0)
    with pytest.raises(InputError, match="Unknown option 'library' of a TVM artefact"):
        isofold.load(compiled.folder, library=True)
    with pytest.raises(InputError, match="expected int64, got float32"):
        compiled(torch.ones(2, 9))


def test_ids_outside_of_their_table_are_an_error(compiled: Any) -> None:
    case = registry.get("llama")
    args = [a.clone() for a in case.args]
    args[0][0, 0] = 10**6
    with pytest.raises(InputError, match=r"TVM failed on these inputs[\s\S]*PackedEmbedding"):
        compiled(*args)


def test_damaged_artefacts(compiled: Any, tmp_path: Path) -> None:
    compiled.save(tmp_path / "a")
    library = tmp_path / "a/model.so"
    content = library.read_bytes()
    library.write_bytes(content[:1000])
    with pytest.raises(ArtefactError, match=r"model.so is truncated"):
        isofold.load(tmp_path / "a")
    library.write_bytes(bytes(len(content)))
    with pytest.raises(ArtefactError, match=r"TVM's runtime cannot open the executable"):
        isofold.load(tmp_path / "a")
    with pytest.raises(ArtefactError, match=r"model.so has another content"):
        isofold.load(tmp_path / "a", verify=True)
    library.unlink()
    with pytest.raises(ArtefactError, match=r"model.so is missing"):
        isofold.load(tmp_path / "a")
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(ArtefactError, match="The weights cannot be read"):
        read_tensors(weights)
