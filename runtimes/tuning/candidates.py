"""Libraries of candidates: one group of kernels with given knobs, what its workloads need besides, and the harness.

Objects are kept in the cache folder under a hash of their sources, so that a resumed run compiles nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import queue
import shlex
import shutil
import subprocess
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import Any

from ...compiler.errors import ToolchainError
from ...compiler.processor import cache_folder
from ..kernels.knobs import DEFAULTS, DRIVER, Settings, sources
from ..onnx.oplib.build import require_tools
from .child import Child, LostError
from .workloads import Workload, groups_of

__all__ = ["Builder", "needed_groups"]

_HERE = Path(__file__).resolve().parent
_KERNELS = _HERE.parent / "kernels"
_COMPILE = "isofold.runtimes.tuning.compile_worker"
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
)
_LINK = ("-shared", "-pthread", "-Wl,--as-needed", "-Wl,--no-undefined", "-static-libgcc", "-s")
_TIMEOUT = 180.0
_KEPT_DAYS = 30


def needed_groups(workload: Workload) -> set[str]:
    """Groups of kernels that the drivers call for a workload."""
    if workload.operator == "attention":
        return set(groups_of(workload, "v4"))
    if workload.operator == "linear_dense":
        return {"linear_dense", "linear_end"}
    if workload.operator == "linear_float":
        return {f"linear_float{workload.bits}", "linear_float8", "linear_end"}
    packed = {f"linear_gemv{workload.bits}"} if workload.bits < 8 else set()
    return {f"linear_{workload.mode}", "linear_gemv4", "linear_end", *packed}


_HASHING = threading.Lock()


def hashed_sources(group: str) -> str:
    """`knobs.sources`, one thread at a time: the parser of Python 3.11 fails when several threads are in it."""
    with _HASHING:
        return sources(group)


class Builder:
    """Compiles candidates with a few worker processes. Thread-safe; close it at the end.

    Raises:
        ToolchainError: g++ or TVM is not installed.
    """

    def __init__(self, scratch: Path, workers: int) -> None:
        self._compiler = shlex.split(require_tools())
        self._scratch = scratch
        self._objects = cache_folder() / "tuning-objects"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._idle: queue.SimpleQueue[Child | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # started when first needed
        self._threads = ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._harness: Path | None = None
        self._count = 0
        self._closed = False

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            child = self._idle.get()
            if child is not None:
                child.close()

    def libraries(
        self, isa: str, group: str, workloads: Sequence[Workload], candidates: Sequence[Mapping[str, int]]
    ) -> list[Path | str]:
        """A library for each candidate (values of the group's knobs), or why there is none."""
        self._prepare()
        groups = set().union(*(needed_groups(w) for w in workloads))
        others = {g: self._threads.submit(self._object, isa, g, DEFAULTS) for g in sorted(groups - {group})}
        made = [self._threads.submit(self._attempt, isa, group, candidate) for candidate in candidates]
        base = {g: future.result() for g, future in others.items()}
        libraries: list[Path | str] = []
        for candidate, future in zip(candidates, made, strict=True):
            found = future.result()
            if isinstance(found, str):
                libraries.append(found)
                continue
            objects = [*base.values(), *([] if found is None else [found])]
            libraries.append(self._link(isa, Settings({group: candidate}), groups, objects))
        return libraries

    def any_library(self) -> Path:
        """A library without kernels: it can tell what machine it is on."""
        self._prepare()
        return self._link("v3", DEFAULTS, (), [])

    def _attempt(self, isa: str, group: str, candidate: Mapping[str, int]) -> Path | str | None:
        """The object of a candidate; None for a group without kernels; a text where it does not compile."""
        if group == DRIVER:
            return None
        try:
            return self._object(isa, group, Settings({group: candidate}))
        except ToolchainError as error:
            return error.text()

    def _object(self, isa: str, group: str, settings: Settings) -> Path:
        facts = json.dumps([hashed_sources(group), isa, group, settings.to_json()])
        path = self._objects / f"{hashlib.sha256(facts.encode()).hexdigest()[:20]}.o"
        if not path.exists():
            self._ask(do="object", isa=isa, group=group, settings=settings.to_json(), path=str(path))
        return path

    def _link(self, isa: str, settings: Settings, groups: Collection[str], objects: Sequence[Path]) -> Path:
        assert self._harness is not None
        with self._lock:
            self._count += 1
            stem = self._scratch / f"candidate{self._count}"
        table, library = stem.with_suffix(".cc"), stem.with_suffix(".so")
        self._ask(do="table", isa=isa, settings=settings.to_json(), groups=sorted(groups), path=str(table))
        inputs = [str(table), str(self._harness), *map(str, objects)]
        self._run([*_FLAGS, *_LINK, f"-I{self._scratch}", "-o", str(library), *inputs], "Linking a candidate")
        return library

    def _prepare(self) -> None:
        """The header and the harness, once."""
        with self._lock:
            if self._harness is not None:
                return
            self._ask(do="header", path=str(self._scratch / "kernels.h"))
            harness = self._scratch / "harness.o"
            source = str(_HERE / "harness.cc")
            includes = [f"-I{self._scratch}", f"-I{_KERNELS}", *(f"-I{folder}" for folder in _tvm_headers())]
            self._run([*_FLAGS, *includes, "-c", source, "-o", str(harness)], "Compiling the tuning harness")
            self._harness = harness

    def _run(self, arguments: Sequence[str], what: str) -> None:
        command = [*self._compiler, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ToolchainError(
                f"{what} failed", where=shlex.join(command), got="\n" + done.stderr.strip()[:3000]
            )

    def _ask(self, **question: Any) -> dict[str, Any]:
        with self._child() as child:
            try:
                answer = child.ask(question, _TIMEOUT)
            except LostError as error:
                raise ToolchainError("The process that compiles kernels was lost", got=str(error)) from None
        if "error" in answer:
            raise ToolchainError(
                "TVM could not compile a candidate", where=str(question), got=answer["error"]
            )
        return answer

    @contextmanager
    def _child(self) -> Iterator[Child]:
        child = self._idle.get()
        try:
            if child is None:
                child = Child(_COMPILE)
            yield child
        except ToolchainError:
            if child is not None:
                child.close()
            child = None
            raise
        finally:
            if self._closed and child is not None:
                child.close()
            else:
                self._idle.put(child)


def forget_old_objects() -> None:
    """Remove compiled candidates that no run has made in a month."""
    import time

    folder = cache_folder() / "tuning-objects"
    limit = time.time() - _KEPT_DAYS * 86400
    for path in folder.glob("*") if folder.exists() else ():
        with suppress(FileNotFoundError):  # another run, whose folders of this minute are left alone
            if path.stat().st_mtime >= limit:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _tvm_headers() -> list[Path]:
    spec = util.find_spec("tvm_ffi")
    if spec is None or spec.origin is None:
        raise ToolchainError("TVM FFI is not installed", hint="pip install 'isofold[build]'")
    return [Path(spec.origin).parent / "include"]
