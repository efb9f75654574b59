"""Running a CUDA executable with TVM's runtime alone: no compiler, no torch, not even the `tvm` package.

Needed are `tvm_ffi`, `libtvm_runtime.so`, `libtvm_runtime_cuda.so`, a driver and a GPU. Weights are copied to the GPU
once; inputs and results are NumPy arrays, copied on each call, or tensors that are there already.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ....compiler.errors import ArtefactError, InputError, ToolchainError

CPU, CUDA = 1, 2
_POOLED = 2
_SAVED = "isofold_run"


def load_runtime(device_type: int = CUDA) -> Any:
    """The module `tvm_ffi` with TVM's runtime for a device loaded. Raises ToolchainError."""
    try:
        import tvm_ffi
    except ImportError as error:
        raise ToolchainError(
            "TVM's runtime is not installed", got=str(error), hint="pip install apache-tvm apache-tvm-ffi"
        ) from error
    names = ["libtvm_runtime.so", *(["libtvm_runtime_cuda.so"] if device_type == CUDA else [])]
    for name in names:
        path = _library(name)
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ToolchainError(
                "TVM's runtime for CUDA cannot be loaded",
                where=str(path),
                expected="an NVIDIA driver (libcuda.so.1) and the CUDA runtime library that TVM was built with",
                got=str(error),
                hint="run on a machine with an NVIDIA GPU, or compile for target tvm-cpu",
            ) from error
    return tvm_ffi


def _library(name: str) -> Path:
    spec = find_spec("tvm")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for place in ("lib", "."):
            if (Path(folder) / place / name).is_file():
                return Path(folder) / place / name
    raise ToolchainError(
        f"{name} is not installed", expected="in the package tvm", hint="pip install apache-tvm"
    )


class CudaExecutor:
    """One executable, opened on one GPU.

    weights: arrays by the names of the functions' parameters. device_type: DLPack's code (tests run on the CPU).
    """

    def __init__(
        self,
        library: Path,
        weights: Mapping[str, np.ndarray[Any, Any]],
        device: int = 0,
        device_type: int = CUDA,
    ) -> None:
        self.ffi = load_runtime(device_type)
        self._allocate = self.ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from_bytes = self.ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = self.ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self.device = self.ffi.device("cuda" if device_type == CUDA else "cpu", device)
        try:
            self.module = self.ffi.load_module(str(library))
            self._machine = self.module["vm_load_executable"]()
            devices = [device_type, device, _POOLED, *([CPU, 0, _POOLED] if device_type != CPU else [])]
            self._machine["vm_initialization"](*devices)
            placed = {name: self.place(array) for name, array in weights.items()}
            bound = [placed[name] for name in self.parameters("main") if name in placed]
            if self._arity("prepare") >= 0:
                bound += list(self._machine["prepare"](*(placed[n] for n in self.parameters("prepare"))))
            self._machine["save_function"]("main", _SAVED, 1, *bound)
            self._main = self._machine[_SAVED]
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise ArtefactError(
                "TVM's runtime cannot open the executable on the GPU",
                where=str(library),
                got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                hint="it needs the TVM version and the GPU architecture it was compiled for, and memory",
            ) from error

    def _arity(self, function: str) -> int:
        try:
            return int(self._machine["get_function_arity"](function))
        except (RuntimeError, ValueError, KeyError, AttributeError):
            return -1

    def parameters(self, function: str) -> list[str]:
        """Names of a function's parameters."""
        name_of = self._machine["get_function_param_name"]
        return [str(name_of(function, i)) for i in range(self._arity(function))]

    def place(self, array: np.ndarray[Any, Any]) -> Any:
        """A copy of an array on the device."""
        array = np.ascontiguousarray(array)
        made = self._allocate(
            self.ffi.Shape(array.shape), self.ffi.dtype(str(array.dtype)), self.device, None
        )
        self._from_bytes(made, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return made

    def fetch(self, tensor: Any) -> np.ndarray[Any, Any]:
        """A tensor of the device as an array."""
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def run_placed(self, tensors: Sequence[Any]) -> list[Any]:
        """Run once on tensors of the device; the results stay there, and the GPU may still be at work."""
        return list(self._main(*tensors))

    def run(
        self, arrays: Sequence[np.ndarray[Any, Any]], threads: int | None = None
    ) -> list[np.ndarray[Any, Any]]:
        """Run once on arrays in the order of the inputs. threads: of no meaning here, as the CPU's executor has it."""
        del threads
        try:
            return [self.fetch(result) for result in self.run_placed([self.place(a) for a in arrays])]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            text = str(error).strip()
            raise InputError(
                "TVM failed on these inputs on the GPU",
                got=f"{text.splitlines()[0] if text else type(error).__name__} (inputs: {shapes})",
                hint="sizes must lie in the ranges that the model was captured with; a GPU out of memory says so above",
            ) from error

    def watch(self, instrument: Any) -> None:
        """Call `instrument(function, name, before, result, *arguments)` around every call of the virtual machine."""
        self._machine["set_instrument"](instrument)
