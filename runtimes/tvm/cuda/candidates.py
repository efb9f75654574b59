"""Libraries of candidates of the GPU's kernels, and what their processes must know to run them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....compiler.errors import ToolchainError
from ....compiler.processor import cache_folder
from .attention import Combine
from .builder import Size, Tensor, prim_func
from .compile import compile_functions
from .device_module import DeviceSource, build_kernels, creating, target_for, with_header
from .toolkit import Resources, compile_cubin

FEW_BYTES = 64
"""Spills that are let be, as in the kernels with their defaults."""


@dataclass(frozen=True)
class Unit:
    """Kernels that are measured together, one after another: each writes what later ones read, the last the result."""

    kernels: tuple[Any, ...]

    def arguments(self, kernel: Any) -> tuple[list[Tensor], list[Tensor]]:
        """What one of them reads and writes."""
        if hasattr(kernel, "inputs"):
            return kernel.inputs(), kernel.outputs()
        tensors = kernel.tensors()
        return tensors[:-1], tensors[-1:]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {t.name: t for kernel in self.kernels for part in self.arguments(kernel) for t in part}

    def functions(self) -> dict[str, Any]:
        """TIR functions by the names they are exported under."""
        made = {}
        for i, kernel in enumerate(self.kernels):
            inputs, outputs = self.arguments(kernel)
            made[f"isofold_stage{i}"] = prim_func(f"isofold_stage{i}", [*inputs, *outputs], kernel.emit)
        return made

    def spec(self, library: Library, sizes: Mapping[str, int]) -> dict[str, Any]:
        """What a worker must know (`tune_worker.Spec`)."""

        def shape(sides: Sequence[Size]) -> list[int]:
            return [side if isinstance(side, int) else sizes[side] for side in sides]

        stages, reads = [], {}
        for i, kernel in enumerate(self.kernels):
            inputs, outputs = self.arguments(kernel)
            stages.append([f"isofold_stage{i}", [t.name for t in (*inputs, *outputs)]])
            reads[f"isofold_stage{i}"] = len(inputs)
        tensors = {name: [shape(t.shape), t.dtype] for name, t in self.tensors().items()}
        results = [t.name for t in self.arguments(self.kernels[-1])[1]]
        return {
            "library": str(library.path), "tensors": tensors, "stages": stages, "reads": reads, "results": results,
        }  # fmt: skip


def unit_of(kernel: Any) -> Unit:
    """A kernel with those that only make sense with it."""
    if type(kernel).__name__ == "FewQueries" and kernel.splits > 1:
        return Unit((kernel, Combine(kernel.shape, kernel.splits)))
    return Unit((kernel,))


@dataclass(frozen=True)
class Library:
    """A compiled candidate: its file (or why there is none) and what its kernels take."""

    path: Path | str
    resources: tuple[Resources, ...] = ()

    @property
    def spills(self) -> int:
        """Bytes that all kernels together spill."""
        return sum(r.spill_stores for r in self.resources)

    def worse_than(self, default: Library) -> str | None:
        """Why it is not worth measuring: it spills more than a few bytes, and more than the default."""
        if self.spills <= max(FEW_BYTES, default.spills):
            return None
        return f"nvcc spills {self.spills} bytes of registers"


class Toolchain:
    """nvcc for one architecture. Thread-safe; cubins are kept in the cache folder, so that a resumed run makes none
    twice."""

    def __init__(self, scratch: Path, arch: str) -> None:
        self.scratch, self.arch = scratch, arch
        self._lock, self._count = threading.Lock(), 0

    def libraries(self, units: Sequence[Unit]) -> list[Library]:
        """A library for each unit."""
        with self._lock:  # TVM's compiler is told where its device code goes by a global function
            self._prefetch([unit.functions() for unit in units])
            return [self._attempt(unit.functions()) for unit in units]

    def _attempt(self, functions: dict[str, Any]) -> Library:
        try:
            return self.library(functions)
        except ToolchainError as error:
            if "There is no nvcc" in error.what:
                raise
            return Library(error.text()[:2000])
        except (RuntimeError, ValueError, TypeError) as error:  # TVM's, of a schedule that was invented
            return Library(f"{type(error).__name__}: {str(error).strip()[-1000:]}")

    def library(self, functions: dict[str, Any]) -> Library:
        """One library. Raises ToolchainError."""
        module, cubin = compile_functions(functions, self.arch)
        self._count += 1
        path = self.scratch / f"candidate{self._count}.so"
        module.export_library(str(path))
        return Library(path, cubin.resources)

    def _prefetch(self, every: Sequence[dict[str, Any]]) -> None:
        """Compile the cubins of all units at once; `library` then finds them in the cache."""
        sources: list[str] = []

        class SeenError(RuntimeError):
            pass

        def create(source: DeviceSource) -> Any:
            sources.append(with_header(source.code))
            raise SeenError

        with creating(create):
            for functions in every:
                with suppress(RuntimeError, ValueError, TypeError):  # `library` says what is wrong
                    build_kernels(functions, target_for(self.arch))

        def compile_one(source: str) -> None:
            with suppress(ToolchainError):
                compile_cubin(source, self.arch, cache_folder() / "cubins")

        with ThreadPoolExecutor() as threads:
            list(threads.map(compile_one, sources))
