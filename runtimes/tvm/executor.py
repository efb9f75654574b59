"""Running an executable with TVM's runtime alone: no compiler, no torch, not even the `tvm` package.

Needed are `tvm_ffi` and `libtvm_runtime.so`. `tvm_ffi` imports torch where it is installed, which takes seconds, so
that it is told there is none unless torch is loaded already.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.errors import ArtefactError, InputError, ToolchainError

ALIGNMENT = 64
_CPU, _POOLED = 1, 2
_BIG_CORES = 1
_SAVED = "isofold_run"


@lru_cache(maxsize=1)
def ffi() -> Any:
    """The module `tvm_ffi` with TVM's runtime loaded. Raises ToolchainError."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment] # makes `import torch` fail
    try:
        import tvm_ffi
    except ImportError as error:
        raise ToolchainError(
            "TVM's runtime is not installed",
            got=str(error),
            hint="pip install apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1",
        ) from error
    finally:
        if absent:
            del sys.modules["torch"]
    ctypes.CDLL(str(runtime_library()), ctypes.RTLD_GLOBAL)
    return tvm_ffi


def runtime_library() -> Path:
    """`libtvm_runtime.so` of the installed package, found without importing it. Raises ToolchainError."""
    spec = find_spec("tvm")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for place in ("lib", "."):
            path = Path(folder) / place / "libtvm_runtime.so"
            if path.is_file():
                return path
    raise ToolchainError(
        "TVM's runtime library is not installed",
        expected="libtvm_runtime.so in the package tvm",
        hint="pip install apache-tvm==0.27.0.post1",
    )


def aligned(array: np.ndarray) -> np.ndarray:
    """The same values, contiguous and at a multiple of 64 bytes, which the kernels' vector loads need."""
    if not array.size:
        return _empty(array)
    array = np.ascontiguousarray(array) if array.ndim else array
    if array.ctypes.data % ALIGNMENT == 0 and array.flags.writeable:
        return array
    space = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _empty(array: np.ndarray) -> np.ndarray:
    """An array without elements (a cache in front of the first token), with the strides that kernels check: NumPy's own
    are all 0."""
    strides = [array.itemsize]
    for size in reversed(array.shape[1:]):
        strides.insert(0, strides[0] * size)
    space = np.empty(2 * ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    return np.ndarray(array.shape, array.dtype, space, start, strides)


class Executor:
    """One executable, opened: `run` takes and gives NumPy arrays.

    The weights are bound once. Threads are those of TVM's pool, one pool for each calling thread.
    """

    def __init__(self, library: Path, weights: dict[str, np.ndarray], threads: int | None = None) -> None:
        tvm_ffi = ffi()
        self.threads = threads
        self._local = threading.local()
        self._configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._tensor = tvm_ffi.from_dlpack
        try:
            self.module = tvm_ffi.load_module(str(library))
            self._vm = self.module["vm_load_executable"]()
            self._vm["vm_initialization"](_CPU, 0, _POOLED)
            self._weights = {name: self._tensor(array) for name, array in weights.items()}
            self._use_threads(threads)
            bound = [self._weights[name] for name in self._parameters("main") if name in weights]
            if "prepare" in self._functions():
                given = [self._weights[name] for name in self._parameters("prepare")]
                bound += list(self._vm["prepare"](*given))
            self._vm["save_function"]("main", _SAVED, 1, *bound)
            self._main = self._vm[_SAVED]
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise ArtefactError(
                "TVM's runtime cannot open the executable",
                where=str(library),
                got=first_line(error),
                hint="it needs the TVM version it was compiled with and this processor's instruction set; "
                "compile the model again here",
            ) from error

    def _functions(self) -> set[str]:
        return {"prepare"} if self._arity("prepare") >= 0 else set()

    def _arity(self, function: str) -> int:
        try:
            return int(self._vm["get_function_arity"](function))
        except (RuntimeError, ValueError, KeyError, AttributeError):
            return -1

    def _parameters(self, function: str) -> list[str]:
        name_of = self._vm["get_function_param_name"]
        return [str(name_of(function, i)) for i in range(self._arity(function))]

    def _use_threads(self, threads: int | None) -> None:
        """TVM's setting belongs to the calling thread; it is changed only where it differs."""
        if getattr(self._local, "threads", None) == threads:
            return
        self._configure(_BIG_CORES, threads or 0)
        self._local.threads = threads

    def run(self, arrays: Sequence[np.ndarray], threads: int | None = None) -> list[np.ndarray]:
        """Run once on arrays in the order of the inputs. Raises InputError where a kernel refuses them."""
        self._use_threads(threads if threads is not None else self.threads)
        given = [self._tensor(aligned(array)) for array in arrays]
        try:
            return [np.from_dlpack(result) for result in self._main(*given)]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise InputError(
                "TVM failed on these inputs",
                got=f"{first_line(error)} (inputs: {shapes})",
                hint="sizes must lie in the ranges that the model was captured with, ids inside their tables",
            ) from error

    def bound(self, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
        """A run on these arrays and nothing else: inputs are bound, results stay TVM's."""
        self._use_threads(self.threads)
        given = [self._tensor(aligned(array)) for array in arrays]
        return lambda: self._main(*given)

    def watch(self, instrument: Any) -> None:
        """Call `instrument(function, name, before, result, *arguments)` around every call of the virtual machine."""
        self._vm["set_instrument"](instrument)

    def operator(self, name: str) -> Any:
        """A function of the library that is not part of the model, such as `isofold_op`."""
        return self.module.get_function(name, query_imports=True)


def first_line(error: BaseException) -> str:
    """The first line of a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
