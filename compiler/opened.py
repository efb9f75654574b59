"""An opened artefact as every runtime gives it: called like the module, measured, copied. Imports no torch.

A runtime's model is a subclass that says how one run is done (`_run`) and how a run is prepared with another number of
threads (`_runner`). Arguments are matched, checked and flattened here, results put back into their structure.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .artefact import MANIFEST, publishing, read_manifest
from .errors import ArtefactError, InputError
from .structure import Structure, decode, flatten

REPORT, EXAMPLES = "report.json", "examples.npz"
DAMAGED = "compile the model again, or copy the whole folder again"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Port:
    """An input or output: name, NumPy dtype, and shape with names for the sizes that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def damage(folder: Path, manifest: Mapping[str, Any], *, hashes: bool) -> list[str]:
    """What is wrong with the files of an artefact: missing, of another size, or (with `hashes`) of other content."""
    problems = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            size = path.stat().st_size
            kind = "truncated" if size < entry["bytes"] else "too long"
            problems.append(f"{name} is {kind}: {size} bytes instead of {entry['bytes']}")
        elif hashes and sha256_of(path) != entry["sha256"]:
            problems.append(f"{name} has another content than was written")
    return problems


def checked_manifest(folder: Path, *, backend: str, threads: int | None, verify: bool) -> dict[str, Any]:
    """The manifest of a backend's artefact whose files are there (`verify`: with the same hashes), and threads can be.

    Raises ArtefactError and InputError.
    """
    if threads is not None and threads < 1:
        raise InputError("Threads must be positive", expected="None or at least 1", got=threads)
    manifest = read_manifest(folder)
    if manifest.get("backend") != backend:
        raise ArtefactError(
            "The artefact is for another runtime",
            where=str(folder),
            expected=backend,
            got=manifest.get("backend"),
        )
    problems = damage(folder, manifest, hashes=verify)
    if problems:
        raise ArtefactError(
            "The artefact is damaged", where=str(folder), got="; ".join(problems), hint=DAMAGED
        )
    return manifest


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OpenedModel:
    """An opened artefact: call it like the module it was compiled from.

    Arguments are NumPy arrays or torch tensors, positional or by keyword; results are arrays, or tensors where a
    tensor was given. Raises InputError for arguments that do not fit, listing all of them.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.inputs = tuple(_port(entry) for entry in manifest["inputs"])
        self.outputs = tuple(_port(entry) for entry in manifest["outputs"])

    @property
    def runs_here(self) -> bool:
        """Whether this machine has the device that the artefact is for."""
        return True

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run once on checked arrays by input name; InputError where the runtime fails on them."""
        raise NotImplementedError

    def _runner(self, threads: int | None) -> Callable[[dict[str, np.ndarray]], Any]:
        """One run with another number of threads than the model was opened with (None: the runtime's choice)."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run once."""
        feed, torch = self._feed(args, kwargs)
        results: list[Any] = self._run(feed)
        if torch is not None:
            results = [torch.from_numpy(r) for r in results]
        return decode(self.manifest["results"], results)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on arrays by input name; results by output name. Raises InputError for inputs that do not fit."""
        names = [port.name for port in self.inputs]
        if set(arrays) != set(names):
            raise InputError(
                "These are not the model's inputs", expected=", ".join(names), got=", ".join(arrays)
            )
        sizes: dict[str, tuple[int, str]] = {}
        problems = [problem for port in self.inputs for problem in _misfit(port, arrays[port.name], sizes)]
        if problems:
            raise InputError("Inputs do not fit the model", got="; ".join(problems))
        results = self._run({name: np.asarray(arrays[name]) for name in names})
        return dict(zip([port.name for port in self.outputs], results, strict=True))

    @property
    def report(self) -> dict[str, Any]:
        """What the compilation did (see docs). Raises ArtefactError where the file is damaged."""
        path = self.folder / REPORT
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ArtefactError(
                "The artefact's report cannot be read", where=str(path), got=str(error), hint=DAMAGED
            ) from error

    def examples(self) -> dict[str, np.ndarray]:
        """The example inputs that the model was compiled with, by name."""
        path = self.folder / EXAMPLES
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {port.name: stored[port.name] for port in self.inputs}
        except (OSError, ValueError, KeyError) as error:
            raise ArtefactError(
                "The artefact's example inputs cannot be read", where=str(path), got=str(error), hint=DAMAGED
            ) from error

    def benchmark(
        self, *args: Any, runs: int = 50, warmup: int = 5, threads: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Latency on the given arguments (default: the example inputs) in milliseconds.

        Returns `{median_ms, q1_ms, q3_ms, min_ms, runs, threads}`. `threads` measures with another number of threads.
        """
        if runs < 1:
            raise InputError("A benchmark needs runs", expected="at least 1", got=runs)
        feed = self._feed(args, kwargs)[0] if args or kwargs else self.examples()
        changed = threads is not None and threads != self.threads
        run = self._runner(threads if changed else self.threads)
        times = []
        for index in range(warmup + runs):
            started = time.perf_counter()
            run(feed)
            if index >= warmup:
                times.append(1e3 * (time.perf_counter() - started))
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if runs > 1 else times * 3
        return {
            "median_ms": median,
            "q1_ms": q1,
            "q3_ms": q3,
            "min_ms": min(times),
            "runs": runs,
            "threads": threads if threads is not None else self.threads,
        }

    def profile(self, *args: Any, runs: int = 10, **kwargs: Any) -> list[dict[str, Any]]:
        """Median time of every operator on the given arguments (default: the example inputs), in order of execution.

        Returns `[{name, op, microseconds, outputs}]`: isofold's operators have the names of the program's nodes
        (`report["layers"][i]["packed"]`); outputs are the shapes of the results.
        """
        raise NotImplementedError

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Copy the artefact to `folder`. Raises ArtefactError."""
        with publishing(Path(folder), overwrite=overwrite) as beside:
            for name in (*self.manifest["files"], REPORT, EXAMPLES, MANIFEST):
                shutil.copyfile(self.folder / name, beside / name)
            for extra in self.folder.glob("*.html"):
                shutil.copyfile(extra, beside / extra.name)

    def _feed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
        arguments = self.manifest["arguments"]
        given = self._by_name(arguments, args, kwargs)
        arrays: list[Any] = [None] * len(self.inputs)
        problems: list[str] = []
        torch = sys.modules.get("torch")
        seen: list[Any] = []

        def take(index: int, where: str, value: Any) -> None:
            if torch is not None and isinstance(value, torch.Tensor):
                seen.append(torch)
                if value.dtype == torch.bfloat16 and self.inputs[index].dtype == "float32":
                    value = value.float()  # what NumPy has no type for was compiled as float32
                try:
                    value = value.detach().cpu().numpy()
                except TypeError:
                    problems.append(f"{where}: NumPy has no {value.dtype}")
                    return
            if not isinstance(value, (np.ndarray, np.generic)):
                problems.append(f"{where}: expected an array, got {type(value).__name__}")
                return
            arrays[index] = np.asarray(value)

        for name, structure in arguments:
            flatten(structure, given[name], name, take)
        sizes: dict[str, tuple[int, str]] = {}
        for port, array in zip(self.inputs, arrays, strict=True):
            if array is not None:
                problems.extend(_misfit(port, array, sizes))
        if problems:
            raise InputError("Inputs do not fit the model", got="; ".join(problems))
        feed = {
            p.name: np.ascontiguousarray(a) if a.ndim else a for p, a in zip(self.inputs, arrays, strict=True)
        }
        return feed, (seen[0] if seen else None)

    def _by_name(
        self, arguments: Sequence[tuple[str, Structure]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        names = [name for name, _ in arguments]
        # Inputs that were captured by keyword may be given by position too, in the order of the capture.
        given = dict(zip(names, args, strict=False))
        unknown = sorted(set(kwargs) - set(names))
        twice = sorted(set(kwargs) & set(given))
        given.update(kwargs)
        # A constant that was compiled in need not be repeated.
        for name, structure in arguments:
            if name not in given and "constant" in structure:
                given[name] = structure["constant"]
        missing = [name for name in names if name not in given]
        problems = [
            f"{len(args)} positional arguments for {len(names)}" if len(args) > len(names) else "",
            f"unknown: {', '.join(unknown)}" if unknown else "",
            f"given twice: {', '.join(twice)}" if twice else "",
            f"missing: {', '.join(missing)}" if missing else "",
        ]
        if any(problems):
            raise InputError(
                "The arguments are not those of the model",
                expected=f"({', '.join(names)})",
                got="; ".join(p for p in problems if p),
            )
        return given


def _misfit(port: Port, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> list[str]:
    """What is wrong with an input; `sizes` collects the named sizes seen so far."""
    problems = []
    if array.dtype.name != port.dtype:
        problems.append(f"{port.name}: expected {port.dtype}, got {array.dtype.name}")
    fits = len(array.shape) == len(port.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(port.shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, port.shape))
        return [*problems, f"{port.name}: expected shape [{wanted}], got {list(array.shape)}"]
    for want, have in zip(port.shape, array.shape, strict=True):
        if isinstance(want, str) and want.isidentifier():
            first, where = sizes.setdefault(want, (have, port.name))
            if first != have:
                problems.append(f"{port.name}: {want} is {have}, but {first} in {where}")
    return problems


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(entry["name"], entry["dtype"], tuple(entry["shape"]))
