"""Relax modules to executables for CUDA: the dialect's kernels, dlight's schedules for the rest, cubins made ahead.

    compiled = compile_module(module, "sm_90a")
    compiled.executable.export_library("model.so")      # needs TVM's runtime and a driver, no compiler
    compiled.resources                                  # registers, spills, shared memory of every kernel

CUDA graphs: `RewriteCUDAGraph` captures every region whose sizes are all static, which is what a decoding step with a
fixed batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import transform
from tvm.tirx import compilation_pipeline

from ....compiler.errors import InputError
from ....compiler.processor import cache_folder
from ..virtual_machine import executable_pipeline
from .device_module import DeviceSource, build_kernels, creating, target_for, with_header
from .driver import cubin_module, prepare
from .generic import fused, with_dlight, with_traces
from .knobs import choosing
from .rewrite import rewrite_dialect
from .toolkit import ARCHS, Cubin, Resources, architectures, compile_cubin
from .tuned import TunedValues

Progress = Callable[[str], None]

DEFAULT_ARCH = "sm_80,sm_90a"
"""What "cuda" alone means: code of sm_80 runs on every 8.x, sm_90a on the GPUs that it does not run on."""
OWN = "isofold.cuda"
"""Attribute of the kernels of this folder."""
PIPELINE = "isofold_cuda"


@dataclass(frozen=True)
class CompiledCuda:
    """An executable and what its kernels take on the GPU."""

    executable: Any
    arch: str
    resources: tuple[Resources, ...]
    cubin_bytes: int
    tuned: int = 0
    """Kernels with values or traces that were measured."""
    trace_failed: tuple[str, ...] = ()
    """Kernels whose tuned trace could not be applied; they have the default schedule."""

    @property
    def spilled(self) -> tuple[Resources, ...]:
        """Kernels that spill registers."""
        return tuple(r for r in self.resources if r.spill_stores or r.spill_loads)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        rows = [
            {
                "kernel": r.kernel,
                "arch": r.arch,
                "registers": r.registers,
                "spill_bytes": r.spill_stores + r.spill_loads,
                "shared_bytes": r.shared,
            }
            for r in self.resources
        ]
        return {
            "arch": self.arch,
            "kernels": len({r.kernel for r in self.resources}),
            "cubin_bytes": self.cubin_bytes,
            "tuned": self.tuned,
            "trace_failed": list(self.trace_failed),
            "resources": rows,
        }


def arch_of(target: str) -> str:
    """The architectures of "cuda", "cuda:sm_90a" or "cuda:sm_80,sm_90a". Raises InputError."""
    kind, _, arch = target.partition(":")
    if kind != "cuda":
        raise InputError(
            "Not a CUDA target", expected="cuda | " + " | ".join(f"cuda:{a}" for a in ARCHS), got=target
        )
    return ",".join(architectures(arch or DEFAULT_ARCH))


def planned(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The module with the dialect's kernels in it."""
    with target:
        # Reshapes are recognised before our kernels come in: TVM looks for them in the blocks of every kernel.
        first = [
            transform.CanonicalizeBindings(),
            transform.LegalizeOps(),
            transform.RewriteDataflowReshape(),
        ]
        return mark_own(rewrite_dialect(tvm.transform.Sequential(first)(module)))


def scheduled(
    module: tvm.IRModule, target: tvm.target.Target, choice: TunedValues | None = None
) -> tvm.IRModule:
    """The module with the dialect's kernels in it and everything else fused and scheduled.

    choice: what tuning found; a trace that cannot be applied is noted there, and its function has dlight's schedule.
    """
    module = fused(planned(module, target), target)
    if choice is not None:
        module, failed = with_traces(module, choice.trace)
        choice.failed.update(failed)
    return with_dlight(module, target)


def mark_own(module: tvm.IRModule) -> tvm.IRModule:
    """Kernels of this folder as functions that nothing fuses or schedules."""
    made = {}
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and OWN in (function.attrs or {}):
            function = function.with_attr("op_pattern", 8).with_attr("tirx.is_scheduled", True)
        made[name] = function
    return tvm.IRModule(made, attrs=module.attrs, global_infos=module.global_infos)


def relax_pipeline(cuda_graphs: bool = True) -> tvm.transform.Pass:
    """The last passes: Relax to instructions of the virtual machine."""
    return executable_pipeline([transform.RewriteCUDAGraph()] if cuda_graphs else [])


def _tir_pipeline() -> Any:
    """Our kernels go through TVM's pipeline that adds no barriers (they have their own), the others through the
    usual."""
    own, host, device = compilation_pipeline.tirx_pipeline()
    usual, _, _ = compilation_pipeline.PIPELINE_MAP["s_tir"]()

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        parts: list[dict[Any, Any]] = [{}, {}]
        for name, function in module.functions_items():
            parts[int(OWN in (function.attrs or {}))][name] = function
        made = [
            run(tvm.IRModule(part, attrs=module.attrs))
            for part, run in zip(parts, (usual, own), strict=True)
            if part
        ]
        result = made[0]
        for more in made[1:]:
            result.update(more)
        return result

    return lower, host, device


compilation_pipeline.register_tir_pipeline(PIPELINE, _tir_pipeline)


def build(module: tvm.IRModule, target: tvm.target.Target, cuda_graphs: bool = True) -> Any:
    """Build a scheduled module with whatever makes device modules at the moment (`device_module.creating`)."""
    options = {"relax.backend.use_cuda_graph": cuda_graphs}
    with tvm.transform.PassContext(opt_level=3, config=options):
        return relax.build(
            module, target=target, relax_pipeline=relax_pipeline(cuda_graphs), tir_pipeline=PIPELINE
        )


@contextmanager
def making_cubins(arch: str, made: list[Cubin], say: Progress, cache: Path | None) -> Iterator[None]:
    """While active, what is built for CUDA becomes cubins of `arch`, which are appended to `made`."""
    prepare()

    def create(source: DeviceSource) -> Any:
        say(f"compile {len(source.kernels)} kernels for {arch}")
        cubin = compile_cubin(with_header(source.code), arch, cache)
        made.append(cubin)
        return cubin_module(source, cubin.data)

    with creating(create):
        yield


def compile_functions(
    functions: dict[str, tirx.PrimFunc], arch: str, progress: Progress | None = None
) -> tuple[Any, Cubin]:
    """A module of kernels alone, by name (tests, benchmarks), and its cubin. Raises as :func:`compile_module`."""
    made: list[Cubin] = []
    target = target_for(architectures(arch)[0])
    with making_cubins(arch, made, progress or (lambda _: None), cache_folder() / "cubins"):
        module = build_kernels(functions, target)
    return module, made[0]


def compile_module(
    module: tvm.IRModule, arch: str, *, cuda_graphs: bool = True, progress: Progress | None = None
) -> CompiledCuda:
    """Compile a Relax module for one architecture, or several ("sm_80,sm_90a").

    Raises InputError (unknown architecture) and ToolchainError (no compiler) and UnsupportedError (an operator without
    kernels).
    """
    say = progress or (lambda _: None)
    target = target_for(architectures(arch)[0])
    made: list[Cubin] = []
    with making_cubins(arch, made, say, cache_folder() / "cubins"):
        say("schedule")
        choice = TunedValues(architectures(arch))
        with choosing(choice):
            module = scheduled(module, target, choice)
        executable = build(module, target, cuda_graphs)
    resources = sorted((r for cubin in made for r in cubin.resources), key=lambda r: r.kernel)
    size = sum(len(c.data) for c in made)
    return CompiledCuda(executable, arch, tuple(resources), size, len(choice.used), tuple(choice.failed))


def compile_library(
    module: tvm.IRModule, target: str, path: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Compile a lowered module into `path`, as `compile_cpu.compile_library` does. Returns facts for the report.

    Raises what `compile_module` raises.
    """
    say = progress or (lambda _: None)
    compiled = compile_module(module, arch_of(target), progress=say)
    say("link")
    compiled.executable.export_library(str(path))
    return compiled.facts()
