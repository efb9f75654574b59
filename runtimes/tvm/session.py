"""Opening and running an artefact with TVM's runtime: NumPy, `tvm_ffi` and the standard library, no torch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.errors import ArtefactError, ToolchainError, refuse_options
from ...compiler.opened import OpenedModel, checked_manifest
from ...compiler.tensor_file import read_tensors
from .executor import Executor, ffi

LIBRARY, WEIGHTS = "model.so", "weights.safetensors"


def open_artefact(
    folder: str | os.PathLike[str], *, threads: int | None = None, verify: bool = False, **unknown: Any
) -> TvmModel:
    """Open an artefact folder.

    threads: of one inference, the calling thread included; None: all processors.
    verify: compare the hashes of all files too, not only their sizes.
    Raises ArtefactError where files are missing, damaged or of a newer version, InputError for bad options.
    """
    refuse_options(unknown, ("threads", "verify"), "a TVM artefact")
    folder = Path(folder)
    manifest = checked_manifest(folder, backend="tvm", threads=threads, verify=verify)
    return TvmModel(folder, manifest, threads)


class TvmModel(OpenedModel):
    """An artefact opened with TVM's virtual machine."""

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None) -> None:
        super().__init__(folder, manifest, threads)
        if not self.on_gpu:
            assert self.executor  # what is wrong with it is said now, not at the first call

    @property
    def on_gpu(self) -> bool:
        """Whether the artefact is for CUDA."""
        return str(self.manifest["target"]).split(":")[0] == "cuda"

    @cached_property
    def executor(self) -> Any:
        """The executable with its weights. One for CUDA is opened at the first call, and needs a GPU."""
        weights = read_tensors(self.folder / WEIGHTS)
        if self.on_gpu:
            from .cuda.executor import CudaExecutor

            return CudaExecutor(self.folder / LIBRARY, weights)
        return Executor(self.folder / LIBRARY, weights, self.threads)

    @property
    def runs_here(self) -> bool:
        """Whether this machine has what the artefact needs: a GPU, for CUDA."""
        try:
            return bool(self.executor)
        except (ToolchainError, ArtefactError):
            return False

    def profile(self, *args: Any, runs: int = 10, **kwargs: Any) -> list[dict[str, Any]]:
        """Median time of every call of the executable, `[{name, op, microseconds, outputs}]` in the order of execution.

        Names of isofold's operators are those of the program's nodes (`report["layers"][i]["packed"]`); the calls of
        kernels that TVM made are named after the kernel. Times include what the virtual machine adds, about a
        microsecond a call.
        """
        feed = self._feed(args, kwargs)[0] if args or kwargs else self.examples()
        watch = _Watch()
        self.executor.watch(ffi().convert(watch))
        try:
            for _ in range(runs + 1):
                watch.start()
                self._run(feed)
        finally:
            self.executor.watch(None)
        return watch.result()

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.executor.run([feed[port.name] for port in self.inputs])

    def _runner(self, threads: int | None) -> Callable[[dict[str, np.ndarray]], Any]:
        names = [port.name for port in self.inputs]
        return lambda feed: self.executor.run([feed[name] for name in names], threads)


class _Watch:
    """Times of the calls of some runs."""

    def __init__(self) -> None:
        self.position = 0
        self.began = 0.0
        self.calls: list[tuple[str, str, list[list[int]]]] = []
        self.times: list[list[float]] = []

    def start(self) -> None:
        self.position = 0

    def __call__(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
        now = time.perf_counter()
        if before:
            self.began = time.perf_counter()
            return 0
        if name.startswith("vm.builtin") or name in ("main", "prepare"):
            return 0
        spent = 1e6 * (now - self.began)
        if self.position == len(self.calls):
            self.calls.append(_called(name, arguments))
            self.times.append([])
        self.times[self.position].append(spent)
        self.position += 1
        return 0

    def result(self) -> list[dict[str, Any]]:
        rows = []
        for (name, op, outputs), times in zip(self.calls, self.times, strict=True):
            spent = statistics.median(times[1:] or times)
            rows.append({"name": name, "op": op, "microseconds": spent, "outputs": outputs})
        return rows


def _called(name: str, arguments: Any) -> tuple[str, str, list[list[int]]]:
    """Name, operator and shapes of the results of one call."""
    shapes = [list(a.shape) for a in arguments if hasattr(a, "shape")]
    if name != "isofold_op":
        return name, name, shapes[-1:]
    words = str(arguments[0]).split()
    facts: Mapping[str, str] = dict(word.split("=", 1) for word in words[1:])
    count = facts["out"].count("1")
    return facts["node"].removeprefix("s:"), words[0], shapes[len(shapes) - count :]
