"""The one place where the benchmarks call isofold: compile a model, save the artefact, say how a worker opens
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Artefact:
    """A saved artefact and what came of compiling it."""

    folder: Path
    model: Path
    compiled: Any

    def spec(self, threads: int, inputs: Path, library: bool = True) -> dict[str, Any]:
        """How a worker opens it, with the op library in its folder or as stock ONNX Runtime would."""
        if self.model == self.folder:
            return {"engine": "tvm", "model": str(self.folder), "threads": threads, "inputs": str(inputs)}
        return {
            "engine": "onnxruntime",
            "model": str(self.model),
            "library": str(self.folder / "libisofold_ops.so") if library else None,
            "threads": threads,
            "inputs": str(inputs),
        }


def op_library() -> str:
    """The op library for this machine, built when it is not there yet."""
    from isofold.runtimes.onnx.oplib.build import library_path

    return str(library_path())


def compile_to(
    folder: Path,
    module: torch.nn.Module,
    recipe: str,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Sequence[Any] | None = None,
    target: str = "cpu",
    **options: Any,
) -> Artefact:
    """Compile with a preset and save into ``folder``, which is made; options: more of `isofold.compile`."""
    import isofold

    compiled = isofold.compile(
        module,
        args,
        kwargs,
        recipe=recipe,
        dynamic_shapes=dynamic_shapes,
        calibration=calibration,
        output=folder,
        target=target,
        **options,
    )
    return Artefact(folder, folder / "model.onnx" if target == "cpu" else folder, compiled)
