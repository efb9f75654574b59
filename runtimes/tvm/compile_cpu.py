"""Relax → a shared library for x86-64: kernels scheduled and compiled by TVM, the op library and its host linked in.

Kernels that TVM makes are fused, then scheduled (`schedule_cpu`), then compiled for one instruction set; the op
library's come for two and choose when they are loaded.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform
from tvm.support import cc

from ...compiler.errors import ToolchainError
from ..onnx.oplib.build import require_tools
from .library import LINK_FLAGS, host_objects
from .schedule_cpu import TRACE_FAILED, TUNED, schedule_cpu, schedule_report
from .virtual_machine import executable_pipeline

Progress = Callable[[str], None]

_TRIPLE = "x86_64-linux-gnu"
FEATURES: dict[str, dict[str, Any]] = {
    "x86-64-v3": {"mcpu": "x86-64-v3"},
    "x86-64-v4": {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
}
"""What the instruction sets of targets (`plugin.INSTRUCTION_SETS`) are to TVM."""


def cpu_target(name: str) -> tvm.target.Target:
    """The TVM target of "tvm-cpu" or "llvm" (this machine) or "llvm:x86-64-v4"."""
    _, _, features = name.partition(":")
    if not features:
        features = _best_here()
    return tvm.target.Target({"kind": "llvm", "mtriple": _TRIPLE, **FEATURES[features]})


def features_of(target: tvm.target.Target) -> str:
    """The instruction set's name."""
    return str(target.attrs["mcpu"])


def _best_here() -> str:
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    )
    wide = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
    return "x86-64-v4" if all(flag in flags.split() for flag in wide) else "x86-64-v3"


def scheduled(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The module with everything legalized, fused and scheduled, before it becomes code."""
    from .tune_cpu import schedules_for_build

    module = fused(module, target)
    with target:
        return schedule_cpu(module, target, schedules_for_build(target))


def fused(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The module with everything legalized and fused: the kernels that are to be scheduled."""
    with target:
        return tvm.transform.Sequential(
            [
                transform.CanonicalizeBindings(),
                # A reshape stays a view: fused, its index arithmetic would cost more than it saves.
                transform.LegalizeOps(skip_ops=["relax.reshape"]),
                transform.AnnotateTIROpPattern(),
                transform.FoldConstant(),
                transform.FuseOps(fuse_opt_level=2),
                transform.FuseTIR(),
                transform.DeadCodeElimination(),
            ]
        )(module)


def compile_library(
    module: tvm.IRModule, target: tvm.target.Target, path: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Compile a lowered module into `path`. Returns facts for the report. Raises ToolchainError."""
    say = progress or (lambda _: None)
    say("schedule")
    module = scheduled(module, target)
    kernels = [name for name, f in module.functions_items() if not isinstance(f, relax.Function)]
    say("compile kernels")
    objects = host_objects(progress)
    with tvm.transform.PassContext(opt_level=3), quiet():
        executable = relax.build(module, target=target, relax_pipeline=executable_pipeline())
    say("link")
    link(executable, path, objects)
    schedules = schedule_report(module)
    return {
        "kernels": len(kernels),
        "tuned": sum(TUNED in (module[name].attrs or {}) for name in kernels),
        "features": features_of(target),
        "trace_failed": [name for name, said in schedules.items() if said.startswith(TRACE_FAILED)],
        "schedules": schedules,
    }


def link(executable: Any, path: Path, objects: list[Path]) -> None:
    """Export a Relax executable with more objects into one shared library. Raises ToolchainError."""
    compiler = shlex.split(require_tools())
    options = [*compiler[1:], *LINK_FLAGS, "-s"]
    try:
        executable.export_library(
            str(path),
            fcompile=cc.create_shared,
            addons=[str(o) for o in objects],
            cc=compiler[0],
            options=options,
        )
    except RuntimeError as error:
        raise ToolchainError("Linking the executable failed", where=str(path), got=f"\n{error}") from error


@contextmanager
def quiet() -> Any:
    """TVM prints what concerns its developers."""
    with redirect_stdout(StringIO()):
        yield
