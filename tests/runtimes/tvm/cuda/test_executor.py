"""The executor that needs only TVM's runtime: its copies and calls on the CPU device, and its errors without a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from isofold.compiler.errors import ArtefactError, InputError, IsofoldError
from isofold.runtimes.tvm.cuda.executor import CPU, CudaExecutor


def library(path: Path) -> Path:
    """y = x + w, compiled for the CPU."""
    bb = relax.BlockBuilder()
    x, w = (relax.Var(n, relax.TensorType([3, 5], "float32")) for n in ("x", "w"))
    with bb.function("main", [x, w], attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(relax.op.add(x, w))]))
        bb.emit_func_output(out)
    executable = relax.build(bb.finalize(), tvm.target.Target("llvm"))
    executable.export_library(str(path))
    return path


def test_weights_are_bound_and_arrays_copied(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    executor = CudaExecutor(library(tmp_path / "model.so"), {"w": w}, device_type=CPU)
    for seed in range(2):
        x = np.random.default_rng(seed).standard_normal((3, 5)).astype(np.float32)
        (y,) = executor.run([x])
        np.testing.assert_array_equal(y, x + w)


def test_wrong_shapes_are_an_input_error(tmp_path: Path) -> None:
    executor = CudaExecutor(
        library(tmp_path / "model.so"), {"w": np.zeros((3, 5), np.float32)}, device_type=CPU
    )
    with pytest.raises(InputError, match="TVM failed on these inputs") as error:
        executor.run([np.zeros((4, 5), np.float32)])
    assert "[4, 5]" in str(error.value)


def test_damaged_library(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="cannot open the executable on the GPU") as error:
        CudaExecutor(path, {}, device_type=CPU)
    assert str(path) in str(error.value)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_so(tmp_path: Path) -> None:
    path = library(tmp_path / "model.so")
    with pytest.raises(IsofoldError) as error:
        CudaExecutor(path, {"w": np.zeros((3, 5), np.float32)})
    assert "GPU" in str(error.value)
