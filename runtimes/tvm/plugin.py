"""The TVM backend as `isofold.compile(target="tvm-cpu")` finds it. Importing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.errors import refuse_options
from ...compiler.registry import register_backend

if TYPE_CHECKING:
    from ...compiler.program import Program
    from .session import TvmModel

Progress = Callable[[str], None]

INSTRUCTION_SETS = ("x86-64-v3", "x86-64-v4")
"""Explicit ones, `llvm:NAME`; both are what the op library's own kernels are compiled for."""


class TvmBackend:
    """TVM's virtual machine: one shared library with TVM's kernels and isofold's."""

    name = "tvm"
    targets: tuple[str, ...] = ("tvm-cpu", "llvm", "cuda")
    suffix = ".so"
    dense_linears = True

    def check_target(self, target: str) -> None:
        """A suffix names an instruction set, or (cuda) an architecture."""
        from ...compiler.errors import InputError, near_misses

        kind, _, suffix = target.partition(":")
        if kind == "cuda":
            if find_spec(f"{__package__}.cuda") is None or find_spec(f"{__package__}.cuda.compile") is None:
                raise InputError(
                    "This isofold is built without CUDA", expected="target cpu | tvm-cpu | llvm", got=target
                )
            from .cuda.toolkit import architectures

            if suffix:
                architectures(suffix)
        elif suffix and suffix not in INSTRUCTION_SETS:
            raise InputError(
                f"Unknown instruction set in the target {target!r}",
                expected=" | ".join(f"llvm:{known}" for known in INSTRUCTION_SETS),
                hint=near_misses(suffix, INSTRUCTION_SETS),
            )

    def write(
        self,
        program: Program,
        folder: Path,
        *,
        report: dict[str, Any],
        progress: Progress | None = None,
        check: bool = True,
        **unknown: Any,
    ) -> dict[str, Any]:
        """Write an artefact into `folder` and put `report["tvm"]` in place.

        check: open the result and compare it with the program.
        """
        from .artefact import write_artefact

        refuse_options(unknown, ("check",), "the TVM backend")
        target = str(report["target"])
        return write_artefact(program, folder, target=target, report=report, progress=progress, check=check)

    def write_file(
        self,
        program: Program,
        path: Path,
        *,
        report: dict[str, Any],
        progress: Progress | None = None,
        check: bool = True,
        **unknown: Any,
    ) -> dict[str, Any]:
        """Write `path` and, beside it, `path` + ".data" (safetensors); `check` as in `write`."""
        from .artefact import write_library

        refuse_options(unknown, ("check",), "the TVM backend")
        target = str(report["target"])
        return write_library(program, path, target=target, report=report, progress=progress, check=check)

    def prepare(self, progress: Progress | None = None, force: bool = False) -> Path | None:
        """Build the op library's objects and their host."""
        from .library import host_objects

        return host_objects(progress, force=force)[-1]

    def tune(
        self,
        subject: Program | Path | None,
        *,
        seconds: float,
        threads: int | None = None,
        rpc: str | None = None,
        key: str = "isofold",
        database: Path | None = None,
        merge: Sequence[Path] = (),
        isa: str | None = None,
        target: str = "tvm-cpu",
        progress: Progress | None = None,
        traces: int = 64,
    ) -> dict[str, Any]:
        """Search the knobs of the op library's kernels, which both runtimes run (`runtimes/tuning`), and for a program
        schedules of the kernels that TVM makes for it (`tune_cpu`), in half of the time each. For CUDA: the knobs of
        the GPU's kernels that a program has (`cuda/tune.py`). traces: so many of MetaSchedule's for each kernel that
        TVM makes."""
        if target.partition(":")[0] == "cuda":
            from .cuda.tune import tune_subject as tune_cuda

            return tune_cuda(
                subject, target, seconds=seconds, rpc=rpc, key=key, database=database, merge=merge, progress=progress,
                traces=traces,
            )  # fmt: skip
        from ..tuning.session import tune_subject
        from .tune_session import tune_generated

        isa = isa or (target.partition(":")[2].removeprefix("x86-64-") or None)
        shared: dict[str, Any] = {
            "threads": threads,
            "rpc": rpc,
            "key": key,
            "isa": isa,
            "progress": progress,
        }
        if seconds > 0 and not isinstance(subject, Path | None):
            return tune_generated(
                subject, seconds=seconds, database=database, merge=merge, traces=traces, **shared
            )
        return tune_subject(subject, seconds=seconds, database=database, merge=merge, **shared)

    def open(self, folder: Path, **options: Any) -> TvmModel:
        """Open an artefact (options: `session.open_artefact`)."""
        from .session import open_artefact

        return open_artefact(folder, **options)


register_backend(TvmBackend())
