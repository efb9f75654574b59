"""Every operator compiles to a cubin for the architectures of the issue; what kernels take; errors of the toolkit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isofold.compiler.errors import InputError, ToolchainError
from isofold.runtimes.tvm.cuda import toolkit
from isofold.runtimes.tvm.cuda.compile import arch_of, compile_functions
from isofold.runtimes.tvm.cuda.operators import EMITTERS

from .emulated import arguments_of, call_of, unique_functions
from .test_operators import CACHED_AXES, CASES, ROWS, repeated

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
ARCHS = ("sm_80", "sm_90a")
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90a": 227 << 10}

FEW_BYTES = 64
"""Spills that are let be: ptxas stores a few words once in some kernels with long epilogues or `tanhf`."""


AXES = {"attention": {"q": (0, 1), "k": (0, 1), "v": (0, 1)}, "attention_cached": CACHED_AXES}


def functions_of(name: str) -> dict[str, Any]:
    """Kernels of three uses of an operator: of linears with few rows, with many, and with a number that is not known
    (which has all that choose among each other); of sparse ones with all layouts."""
    every = CASES[name][:: max(1, len(CASES[name]) // 3)][:3]
    if "sparse" in name:
        # "LAYOUT-VALUE-gGROUP-kK-...": the first of each.
        every = list({what.split("-k")[0]: (what, a) for what, a in reversed(CASES[name])}.values())
    plans = []
    for i, (_, arguments) in enumerate(every):
        full = arguments_of(name, arguments)
        axes: dict[str, tuple[int, ...]] | None = None
        if "linear" in name:
            axes = (
                dict.fromkeys(ROWS, (0,)) if i % 3 == 2 or full.get("layout") in ("bitmask", "2:4") else None
            )
            full = arguments_of(name, repeated(arguments, 40)) if i % 3 == 1 and axes is None else full
        elif name in AXES and i:
            axes = AXES[name] | ({"mask": (2, 3)} if full["mask"] is not None else {})
        plans.append(EMITTERS[name](call_of(name, full, axes)[0]))
    return unique_functions(plans)[0]


@pytest.mark.parametrize("name", sorted(EMITTERS))
def test_every_operator_compiles(name: str) -> None:
    functions = functions_of(name)
    _, cubin = compile_functions(functions, ",".join(ARCHS))
    assert cubin.data.count(b"\x7fELF") >= len(ARCHS)
    for arch in ARCHS:
        found = [r for r in cubin.resources if r.arch == arch]
        assert len(found) >= len(functions)
        spilled = {r.kernel: r.spill_stores for r in found if r.spill_stores > FEW_BYTES}
        assert not spilled, arch
        assert all(r.shared <= SHARED_LIMITS[arch] for r in found)


def test_sparse_weights_use_sparse_tensor_cores_from_16_rows_on() -> None:
    _, arguments = next(c for c in CASES["linear_sparse"] if c[0].startswith("2:4"))
    full = arguments_of("linear_sparse", arguments)
    for times, kernel in ((2, "sparse_2of4"), (3, "sparse_gemm")):
        more = repeated({**full, "u": full["u"].flatten(0, -2)[:6], "residual": None}, times)
        params = full["params"] if full["params"].dim() == 1 else torch.ones(6 * times, 2)
        plan = EMITTERS["linear_sparse"](call_of("linear_sparse", {**more, "params": params})[0])
        assert [stage.name.startswith(kernel) for stage in plan.stages] == [True]


LOG = """ptxas info    : Compiling entry function 'first_kernel' for 'sm_80'
ptxas info    : Function properties for first_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'another_kernel' for 'sm_80'
ptxas info    : Function properties for another_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 368 bytes cmem[0]
"""


def test_resources_are_read_from_the_log() -> None:
    another, first = toolkit.parse_resources(LOG)
    found = [(r.kernel, r.arch, r.registers, r.stack, r.spill_stores) for r in (another, first)]
    assert found == [("another_kernel", "sm_80", 8, 0, 0), ("first_kernel", "sm_80", 40, 16, 8)]
    assert (another.shared, another.spill_loads) == (0, 0)
    assert (first.spill_loads, first.shared) == (12, 4096)
    assert toolkit.Cubin(("sm_80",), b"", (another, first)).spilled == (first,)


def test_several_architectures_are_one_fat_binary() -> None:
    assert arch_of("cuda") == "sm_80,sm_90a"
    source = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1.0f; }'
    cubin = toolkit.compile_cubin(source, "sm_90a,sm_80")
    assert cubin.archs == ("sm_80", "sm_90a")
    assert int.from_bytes(cubin.data[:4], "little") == 0xBA55ED50  # of fat binaries
    assert [(r.kernel, r.arch) for r in cubin.resources] == [("k", "sm_80"), ("k", "sm_90a")]


@pytest.mark.parametrize("target", ["cuda:sm_75", "cuda:90", "cuda:sm_80,sm_20"])
def test_unknown_architecture(target: str) -> None:
    with pytest.raises(InputError, match="Unknown architecture of a CUDA target") as error:
        arch_of(target)
    assert "cuda:sm_90a" in str(error.value)
    assert target.rpartition(":")[2].rpartition(",")[2] in str(error.value)


def test_source_that_nvcc_refuses_is_quoted() -> None:
    with pytest.raises(ToolchainError, match="nvcc does not compile the kernels for sm_80") as error:
        toolkit.compile_cubin("__global__ void k() { undeclared(); }", "sm_80")
    assert "undeclared" in str(error.value)


def test_equal_sources_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] = 1.0f; }'
    first = toolkit.compile_cubin(source, "sm_80", tmp_path)
    assert len(list(tmp_path.glob("*.cubin"))) == 1

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(toolkit.subprocess, "run", refuse)
    assert toolkit.compile_cubin(source, "sm_80", tmp_path) == first
