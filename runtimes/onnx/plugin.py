"""The ONNX backend as `isofold.compile(target="cpu")` finds it. Importing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.errors import refuse_options
from ...compiler.registry import register_backend

if TYPE_CHECKING:
    from ...compiler.program import Program
    from .session import OnnxModel

Progress = Callable[[str], None]


class OnnxBackend:
    """ONNX Runtime on the CPU, with isofold's op library."""

    name = "onnx"
    targets: tuple[str, ...] = ("cpu", "onnx", "onnx-cpu")
    suffix = ".onnx"
    dense_linears = False

    def check_target(self, target: str) -> None:
        """Targets have no suffix."""
        from ...compiler.errors import InputError

        if target not in self.targets:
            raise InputError(f"Unknown target {target!r}", expected=" | ".join(self.targets))

    def write(
        self,
        program: Program,
        folder: Path,
        *,
        report: dict[str, Any],
        progress: Progress | None = None,
        library: bool = True,
        check: bool = True,
        **unknown: Any,
    ) -> dict[str, Any]:
        """Write an artefact into `folder` and put `report["onnx"]` in place.

        library: put the op library into the artefact (built now where there is none yet).
        check: open the result, compare it with the program, and see that packed weights stay packed.
        """
        from .artefact import write_artefact

        refuse_options(unknown, ("library", "check"), "the ONNX backend")
        return write_artefact(program, folder, report=report, progress=progress, library=library, check=check)

    def write_file(
        self,
        program: Program,
        path: Path,
        *,
        report: dict[str, Any],
        progress: Progress | None = None,
        library: bool = True,
        check: bool = True,
        **unknown: Any,
    ) -> dict[str, Any]:
        """Write `path` and, beside it, `path` + ".data"; `library` and `check` as in `write` (no library is copied)."""
        from .artefact import write_onnx

        refuse_options(unknown, ("library", "check"), "the ONNX backend")
        return write_onnx(program, path, report=report, progress=progress, library=library, check=check)

    def prepare(self, progress: Progress | None = None, force: bool = False) -> Path | None:
        """Build the op library."""
        from .oplib.build import build

        return build(force=force, progress=_counted(progress))

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
        target: str = "cpu",
        traces: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Search the knobs of the kernels of a program's, an artefact's or the default linears (`runtimes/tuning`).

        merge: databases whose records are taken over first. seconds 0: only that.
        """
        from ..tuning.session import tune_subject

        del target, traces  # all kernels of the op library are isofold's own
        return tune_subject(
            subject,
            seconds=seconds,
            threads=threads,
            rpc=rpc,
            key=key,
            database=database,
            merge=merge,
            isa=isa,
            progress=progress,
        )

    def open(self, folder: Path, **options: Any) -> OnnxModel:
        """Open an artefact (options: `session.open_artefact`)."""
        from .session import open_artefact

        return open_artefact(folder, **options)


def _counted(progress: Progress | None) -> Callable[[str, int, int], None] | None:
    return None if progress is None else lambda what, done, total: progress(f"{what} ({done}/{total})")


register_backend(OnnxBackend())
