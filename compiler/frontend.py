"""The front door: `compile`, `export` and the program-level half of both."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .artefact import publishing
from .canonicalize import canonicalize
from .capture import capture
from .driver import run_steps
from .errors import ArtefactError, InputError
from .machine import known_machine
from .opened import OpenedModel
from .passes import PassReport
from .program import Program
from .recipe import Recipe, resolve
from .registry import backend_for, pipeline
from .report import build_report
from .report_files import add_measurements
from .spaces.analysis import analyse
from .spaces.describe import describe

Model = nn.Module | ExportedProgram | Program | str | os.PathLike[str]
Progress = Callable[[str], None]


@dataclass
class Lowerable:
    """A program that a recipe was applied to, with what was captured and what the passes did."""

    captured: Program
    program: Program
    recipe: Recipe
    passes: list[PassReport]
    seconds: dict[str, float] = field(default_factory=dict)
    spaces: dict[str, Any] | None = None
    """Channel spaces of the canonical program (`spaces.describe`), where the recipe folds something."""


def prepare(
    model: Model,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: Recipe | str | os.PathLike[str] | dict[str, Any] = "w8a8",
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    progress: Progress | None = None,
    dense: bool = False,
) -> Lowerable:
    """Capture `model` and run the passes of `recipe`; the half of `compile` that knows no runtime.

    dense: the runtime wants float linears in panels (`Backend.dense_linears`). Other arguments and errors are those of
    `compile`.
    """
    say = progress or (lambda _: None)
    chosen = resolve(recipe)
    if chosen.calibrated and calibration is None:
        what, instead = chosen.calibrated[0]
        raise InputError(
            f"The recipe has {what} on data",
            where=f"recipe {chosen.name!r}",
            hint=f"pass calibration=[...] (a few dozen typical inputs), or use {instead}",
        )
    started = time.perf_counter()
    say("capture")
    captured = capture_model(model, args, kwargs, dynamic_shapes)
    seconds = {"capture": time.perf_counter() - started}
    started = time.perf_counter()
    steps = pipeline()(captured, chosen, calibration, dense)
    spaces: dict[str, Any] | None = None

    def look(name: str, program: Program) -> None:
        nonlocal spaces
        if name == canonicalize.name and chosen.fold is not None:
            spaces = describe(analyse(program))

    program, reports = run_steps(captured, steps, verify=verify, progress=say, watch=look)
    seconds["passes"] = time.perf_counter() - started
    return Lowerable(captured, program, chosen, reports, seconds, spaces)


def compile(  # named for what users call: isofold.compile
    model: Model,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "cpu",
    recipe: Recipe | str | os.PathLike[str] | dict[str, Any] = "w8a8",
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    measure: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> OpenedModel:
    """Compile a PyTorch model into a smaller, faster one.

    model: an nn.Module, an ExportedProgram, a Program, or the path of a `.pt2` file.
    args, kwargs: example inputs (needed for a plain module; an ExportedProgram, a `.pt2` file and a transformers model
        bring their own). They also serve verification, so they should be typical.
    target: where it runs; "cpu" is ONNX Runtime with isofold's op library, "tvm-cpu" a TVM executable for this machine,
        "llvm:x86-64-v3" or "llvm:x86-64-v4" one for that instruction set, "cuda" or "cuda:sm_90a" one for NVIDIA GPUs.
    recipe: a preset's name, a YAML file, a mapping or a Recipe.
    calibration: typical inputs, each a tuple of args, a dict of kwargs, or one tensor. Needed by recipes that choose
        something on data: static ranges, GPTQ, transforms, structured pruning by activation.
    dynamic_shapes: as for torch.export.export.
    output: folder of the artefact; None keeps it in a temporary folder until `.save(folder)`.
    overwrite: replace an artefact that exists at `output`.
    verify: compare the program in float64 after every pass.
    measure: time every operator on the example inputs and write `report.html` into the artefact.
    progress: called with the name of each stage.
    options: of the backend that `target` names (for "cpu": `library=False` leaves the op library out).

    Returns a callable with the module's signature, `.report`, `.benchmark()` and `.save()`. Raises CaptureError,
    InputError, RecipeError, UnsupportedError, VerificationError, ArtefactError or ToolchainError, all of them
    IsofoldError; nothing half-written is left behind.
    """
    backend = backend_for(target)
    say = progress or (lambda _: None)
    if output is not None and Path(output).exists() and not overwrite:
        with publishing(Path(output), overwrite=False):
            pass
    lowerable = prepare(
        model,
        args,
        kwargs,
        recipe=recipe,
        calibration=calibration,
        dynamic_shapes=dynamic_shapes,
        verify=verify,
        progress=say,
        dense=backend.dense_linears,
    )
    temporary = None
    if output is None:
        temporary = Path(tempfile.mkdtemp(prefix="isofold-"))
        output = temporary / "artefact"
    try:
        with publishing(Path(output), overwrite=overwrite) as folder:
            started = time.perf_counter()
            report = report_of(lowerable, target)
            backend.write(lowerable.program, folder, report=report, progress=say, **options)
            lowerable.seconds["write"] = time.perf_counter() - started
        opened = backend.open(Path(output))
        if measure:
            say("measure every operator")
            add_measurements(opened, Path(output), lowerable.seconds)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(opened, shutil.rmtree, temporary, ignore_errors=True)
    return opened


def export(
    model: Model,
    path: str | os.PathLike[str],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "cpu",
    recipe: Recipe | str | os.PathLike[str] | dict[str, Any] = "w8a8",
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compile a model and write it to one file of the backend's own kind, `model.onnx` for "cpu".

    Arguments are those of `compile`; `path` is the file (weights go to `path` + ".data" beside it). Returns the report.
    Raises IsofoldError; existing files are replaced only once the new ones are complete.
    """
    backend = backend_for(target)
    path = Path(path)
    if path.suffix != backend.suffix:
        raise ArtefactError(
            f"The target {target!r} is exported to another kind of file",
            where=str(path),
            expected=f"a path that ends in {backend.suffix}",
            got=path.suffix or "no suffix",
            hint="isofold.compile(..., output=folder) writes a whole artefact",
        )
    lowerable = prepare(
        model,
        args,
        kwargs,
        recipe=recipe,
        calibration=calibration,
        dynamic_shapes=dynamic_shapes,
        verify=verify,
        progress=progress,
        dense=backend.dense_linears,
    )
    report = report_of(lowerable, target)
    backend.write_file(lowerable.program, path, report=report, progress=progress, **options)
    return report


def report_of(lowerable: Lowerable, target: str, *, predict: bool = True) -> dict[str, Any]:
    """The report of a prepared program: what `OnnxModel.report` returns and the HTML page shows.

    predict: put in what the cost model says.
    """
    from importlib.metadata import version

    environment = {
        "isofold": version("isofold"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    rates, own = known_machine() if predict else (None, False)
    return build_report(
        captured=lowerable.captured,
        program=lowerable.program,
        passes=lowerable.passes,
        recipe=lowerable.recipe.model_dump(mode="json"),
        target=target,
        environment=environment,
        seconds=lowerable.seconds,
        spaces=lowerable.spaces,
        machine=rates,
        measured_here=own,
    )


def capture_model(
    model: Model, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> Program:
    """The program of a model; a transformers model without inputs gets examples. Raises CaptureError, InputError."""
    if isinstance(model, nn.Module) and args is None and kwargs is None:
        from .examples_from import examples_from

        found = examples_from(model)
        if found is not None:
            return capture(found.module, found.args, found.kwargs, found.dynamic_shapes)
    return capture(model, args, kwargs, dynamic_shapes)
