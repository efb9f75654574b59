"""Writing artefacts: the exported model, the op library, example inputs, report and manifest in one folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...compiler.artefact import FORMAT_VERSION, MANIFEST, cannot_write
from ...compiler.interface import cache_facts, input_names, input_structure, output_structure
from ...compiler.opened import EXAMPLES, REPORT, sha256_of
from ...compiler.program import Program
from .check import check_packed, check_results
from .export import Exported, export_onnx
from .session import LIBRARY, MODEL, WEIGHTS

Progress = Callable[[str], None]


def write_artefact(
    program: Program,
    folder: Path,
    *,
    report: dict[str, Any],
    progress: Progress | None = None,
    library: bool = True,
    check: bool = True,
) -> dict[str, Any]:
    """Write everything into `folder`, the manifest last. Returns the facts, which are also `report["onnx"]`.

    Raises what `export_onnx`, the checks and the build of the op library raise.
    """
    say = progress or (lambda _: None)
    built = _library(say) if library else None
    exported = export_onnx(program, folder / MODEL, WEIGHTS, progress=progress)
    files = {f.name: {"bytes": f.size, "sha256": f.sha256} for f in exported.files}
    try:
        if built is not None:
            shutil.copyfile(built, folder / LIBRARY)
            files[LIBRARY] = {"bytes": built.stat().st_size, "sha256": sha256_of(built)}
        _write_examples(program, folder / EXAMPLES)
        facts = _facts(program, exported, folder / MODEL, built, check, say)
        report["onnx"] = facts
        (folder / REPORT).write_text(json.dumps(report, indent=1))
        (folder / MANIFEST).write_text(json.dumps(_manifest(program, exported.model, files), indent=1))
    except OSError as error:
        raise cannot_write(folder, error) from error
    return facts


def write_onnx(
    program: Program,
    path: Path,
    *,
    report: dict[str, Any],
    progress: Progress | None = None,
    library: bool = True,
    check: bool = True,
) -> dict[str, Any]:
    """Write `path` and `path` + ".data". Existing files are replaced when the new ones are complete and checked."""
    say = progress or (lambda _: None)
    built = _library(say) if library else None
    path = path.absolute()
    data = path.with_name(f"{path.name}.data")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
            made = Path(beside) / path.name
            exported = export_onnx(program, made, data.name, progress=progress)
            facts = _facts(program, exported, made, built, check, say)
            made.with_name(data.name).replace(data)
            made.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    report["onnx"] = facts
    return facts


def _library(say: Progress) -> Path:
    from .oplib.build import library_path

    say("op library")
    return library_path(progress=lambda what, done, total: say(f"op library: {what} ({done}/{total})"))


def _facts(
    program: Program, exported: Exported, path: Path, library: Path | None, check: bool, say: Progress
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "nodes": sum(1 for _ in exported.model.graph),
        "files": {f.name: f.size for f in exported.files},
        "functions": len(exported.model.functions),
    }
    if check:
        say("check packed weights")
        facts.update(check_packed(exported.model, path, library))
        say("compare results")
        facts["results"] = check_results(program, path, library)
    return facts


def _write_examples(program: Program, path: Path) -> None:
    flat = program.flatten_inputs(program.example_args, program.example_kwargs)
    tensors = [t.detach().cpu().numpy() for t in flat if isinstance(t, torch.Tensor)]
    arrays: dict[str, Any] = dict(zip(input_names(program), tensors, strict=True))
    np.savez_compressed(path, **arrays)


def _manifest(program: Program, model: ir.Model, files: dict[str, Any]) -> dict[str, Any]:
    try:
        own = version("isofold")
    except PackageNotFoundError:
        own = "unknown"
    structure = input_structure(program)
    arguments = [*zip(structure["names"], structure["args"], strict=True), *structure["kwargs"].items()]
    return {
        "format_version": FORMAT_VERSION,
        "isofold": own,
        "backend": "onnx",
        "files": files,
        "inputs": [_port(v) for v in model.graph.inputs],
        "outputs": [_port(v) for v in model.graph.outputs],
        "arguments": arguments,
        "results": output_structure(program),
        "caches": cache_facts(program),
    }


def _port(value: ir.Value) -> dict[str, Any]:
    assert value.dtype is not None
    assert value.shape is not None
    shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape}
