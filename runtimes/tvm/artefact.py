"""Writing artefacts: one shared library, the weights in one mapped file, example inputs, report and manifest."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compiler.artefact import FORMAT_VERSION, MANIFEST, cannot_write, replacing
from ...compiler.graph import value
from ...compiler.interface import (
    cache_facts,
    dimension_names,
    input_names,
    input_structure,
    output_names,
    output_structure,
)
from ...compiler.opened import EXAMPLES, REPORT, sha256_of
from ...compiler.program import Program
from ...compiler.tensor_file import read_tensors, write_tensors
from .builder import dtype_name
from .check import check_results
from .compile_cpu import compile_library, cpu_target
from .lower import Lowered, lower, output_leaves
from .session import LIBRARY, WEIGHTS

Progress = Callable[[str], None]


def write_artefact(
    program: Program,
    folder: Path,
    *,
    target: str,
    report: dict[str, Any],
    progress: Progress | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Write everything into `folder`, the manifest last. Returns the facts, which are also `report["tvm"]`.

    Raises what lowering, compilation and the check raise.
    """
    say = progress or (lambda _: None)
    try:
        facts = _write_model(program, folder / LIBRARY, folder / WEIGHTS, target, check, say)
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in (LIBRARY, WEIGHTS)
        }
        write_examples(program, folder / EXAMPLES)
        report["tvm"] = facts
        (folder / REPORT).write_text(json.dumps(report, indent=1))
        (folder / MANIFEST).write_text(json.dumps(manifest_of(program, target, files), indent=1))
    except OSError as error:
        raise cannot_write(folder, error) from error
    return facts


def write_library(
    program: Program,
    path: Path,
    *,
    target: str,
    report: dict[str, Any],
    progress: Progress | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Write the library `path` and the weights `path` + ".data"; existing files are replaced once both are complete."""
    say = progress or (lambda _: None)
    path = path.absolute()
    data = path.with_name(f"{path.name}.data")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
            made, weights = Path(beside) / path.name, Path(beside) / data.name
            facts = _write_model(program, made, weights, target, check, say)
            weights.replace(data)
            made.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    report["tvm"] = facts
    return facts


def _write_model(
    program: Program, library: Path, weights: Path, target: str, check: bool, say: Progress
) -> dict[str, Any]:
    facts = compile_program(program, library, weights, target, say)
    if check and not _is_cuda(target):
        say("compare results")
        facts["results"] = check_results(program, library, read_tensors(weights))
    return facts


def compile_program(
    program: Program, library: Path, weights: Path, target: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Compile a program for a CPU or for CUDA into `library`, and write its tensors to `weights`. Returns facts for the
    report.

    Raises InputError (unknown architecture), ToolchainError (no compiler) and UnsupportedError (an operator that is not
    lowered).
    """
    say = progress or (lambda _: None)
    if _is_cuda(target):
        # The GPU half of the backend, which need not be there (`plugin.check_target` has seen that it is).
        compile_for: Any = import_module(f"{__package__}.cuda.compile").compile_library
        chosen: Any = target
    else:
        compile_for, chosen = compile_library, cpu_target(target)
    say("lower to Relax")
    lowered = lower(program)
    say("write weights")
    with replacing(weights) as file:
        size = write_tensors(file, weight_entries(program, lowered), {"format": "isofold", "target": target})
    facts: dict[str, Any] = compile_for(lowered.module, chosen, library, say)
    return facts | {
        "fallbacks": lowered.fallbacks,
        "files": {library.name: library.stat().st_size, weights.name: size},
        "prepared": lowered.prepared,
    }


def _is_cuda(target: str) -> bool:
    return target.split(":")[0] == "cuda"


def weight_entries(
    program: Program, lowered: Lowered
) -> Iterator[tuple[str, str, tuple[int, ...], memoryview | bytes]]:
    """Tensors in the order in which the executable reads them: (name, dtype, shape, bytes)."""
    for name, parameter in lowered.parameters.items():
        tensor = program.tensors[name].detach().cpu().contiguous()
        yield parameter, dtype_name(tensor.dtype), tuple(int(s) for s in tensor.shape), _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> memoryview | bytes:
    if not tensor.numel():
        return b""
    array: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data


def write_examples(program: Program, path: Path) -> None:
    """The example inputs by name."""
    flat = program.flatten_inputs(program.example_args, program.example_kwargs)
    tensors = [t.detach().cpu().numpy() for t in flat if isinstance(t, Tensor)]
    arrays: dict[str, Any] = dict(zip(input_names(program), tensors, strict=True))
    np.savez_compressed(path, **arrays)


def manifest_of(program: Program, target: str, files: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an artefact of this program."""
    try:
        own = version("isofold")
    except PackageNotFoundError:
        own = "unknown"
    structure = input_structure(program)
    arguments = [*zip(structure["names"], structure["args"], strict=True), *structure["kwargs"].items()]
    names = dimension_names(program)
    inputs = [node for node in program.placeholders if isinstance(value(node), Tensor)]
    return {
        "format_version": FORMAT_VERSION,
        "isofold": own,
        "backend": "tvm",
        "target": target,
        "files": files,
        "inputs": [
            _port(n, value(node), names) for n, node in zip(input_names(program), inputs, strict=True)
        ],
        "outputs": [
            _port(name, value(node), names)
            for name, node in zip(output_names(program), output_leaves(program), strict=True)
        ],
        "arguments": arguments,
        "results": output_structure(program),
        "caches": cache_facts(program),
    }


def _port(name: str, found: Any, names: dict[str, str]) -> dict[str, Any]:
    if not isinstance(found, Tensor):
        return {"name": name, "dtype": "int64", "shape": []}
    shape = [s if isinstance(s, int) else _renamed(str(s), names) for s in found.shape]
    return {"name": name, "dtype": dtype_name(found.dtype), "shape": shape}


def _renamed(size: str, names: dict[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), size)
