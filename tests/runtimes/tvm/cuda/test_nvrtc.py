"""NVRTC in the place of nvcc: the same kernels, fat binaries byte for byte nvcc's, and what is said without it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from isofold.compiler.errors import ToolchainError
from isofold.runtimes.tvm.cuda import nvrtc, toolkit
from isofold.runtimes.tvm.cuda.compile import compile_functions
from isofold.runtimes.tvm.cuda.operators import EMITTERS

from .emulated import arguments_of, call_of, unique_functions
from .test_operators import CASES

LIBRARY, FOUND = nvrtc.find_nvrtc()
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
needs_nvrtc = pytest.mark.skipif(LIBRARY is None, reason=FOUND)
SOURCE = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1.0f; }'


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFOLD_NVCC", "/nowhere/nvcc")


@needs_nvcc
def test_fat_binaries_are_those_of_nvcc(tmp_path: Path) -> None:
    code = tmp_path / "k.cu"
    code.write_text(SOURCE)

    def run(*options: str) -> bytes:
        out = tmp_path / "out"
        subprocess.run(["nvcc", *options, "-o", str(out), str(code)], check=True)
        return out.read_bytes()

    cubins = {arch: run("-cubin", f"-arch={arch}") for arch in ("sm_80", "sm_90a")}
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90a")]
    assert nvrtc.fat_binary(cubins) == run("-fatbin", "--no-compress", *targets)


@needs_nvrtc
def test_kernels_compile_with_nvrtc(no_nvcc: None) -> None:
    """Asynchronous copies, tensor cores, halves, and what TVM writes in front of kernels."""
    plans = []
    for name in ("linear_packed", "linear_sparse", "attention_cached"):
        _, arguments = next(c for c in CASES[name] if name != "linear_packed" or "g32" in c[0])
        plans.append(EMITTERS[name](call_of(name, arguments_of(name, arguments))[0]))
    functions, _ = unique_functions(plans)
    _, cubin = compile_functions(functions, "sm_80,sm_90a")
    assert int.from_bytes(cubin.data[:4], "little") == 0xBA55ED50
    assert cubin.data.count(b"\x7fELF") == 2
    kernels = {(r.kernel, r.arch) for r in cubin.resources}
    assert len(kernels) == 2 * len({kernel for kernel, _ in kernels}) >= 2 * len(functions)
    assert all(r.registers > 0 for r in cubin.resources)


@needs_nvrtc
def test_source_that_nvrtc_refuses_is_quoted(no_nvcc: None) -> None:
    with pytest.raises(ToolchainError, match="NVRTC does not compile the kernels for sm_80") as error:
        toolkit.compile_cubin("__global__ void k() { undeclared(); }", "sm_80")
    assert "undeclared" in str(error.value)


@needs_nvcc
def test_nvcc_comes_first() -> None:
    assert isinstance(toolkit.find_compiler(), toolkit.Nvcc)


def test_neither_is_an_error_that_names_both(no_nvcc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFOLD_NVRTC", "/nowhere/libnvrtc.so")
    with pytest.raises(ToolchainError, match="neither nvcc nor NVRTC") as error:
        toolkit.compile_cubin(SOURCE, "sm_80")
    for part in ("ISOFOLD_NVCC='/nowhere/nvcc'", "ISOFOLD_NVRTC='/nowhere/libnvrtc.so'", "nvidia-cuda-nvrtc"):
        assert part in str(error.value)


def test_nvrtc_without_headers(no_nvcc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def libraries() -> Any:
        yield "/somewhere/libnvrtc.so.13"

    monkeypatch.setattr(nvrtc, "_libraries", libraries)
    monkeypatch.setattr(nvrtc, "_roots", lambda: iter([tmp_path]))
    with pytest.raises(ToolchainError, match="neither nvcc nor NVRTC") as error:
        toolkit.compile_cubin(SOURCE, "sm_80")
    assert "NVRTC at /somewhere/libnvrtc.so.13, but no cuda_fp16.h" in str(error.value)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_fp16.h").touch()
    found, _ = nvrtc.find_nvrtc()
    assert found == nvrtc.Nvrtc("/somewhere/libnvrtc.so.13", (str(tmp_path / "include"),))
