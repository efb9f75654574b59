"""A GPU for measuring: tensors, kernels in CUDA graphs, events. TVM's runtime and libcudart alone."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....compiler.errors import InputError
from .executor import CUDA, load_runtime

_TO_DEVICE_FROM_DEVICE = 3
_THREAD_LOCAL = 1
_L2_CACHE = 38
"""cudaDevAttrL2CacheSize."""


def has_gpu() -> bool:
    """Whether this machine's driver has a GPU (no runtime is loaded)."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        # A stand-in of `driver.py` has no such functions.
        return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0
    except (OSError, AttributeError):
        return False


class Gpu:
    """GPU 0. Raises InputError where there is none, and ToolchainError where TVM's runtime cannot use it; what the
    runtime reports later is a RuntimeError."""

    def __init__(self) -> None:
        self.ffi = load_runtime(CUDA)
        self._cuda = ctypes.CDLL("libcudart.so.13", ctypes.RTLD_GLOBAL)
        count = ctypes.c_int(0)
        if self._cuda.cudaGetDeviceCount(ctypes.byref(count)) or not count.value:
            raise InputError(
                "This machine has no GPU", hint="run on one with an NVIDIA GPU of sm_80 or later"
            )
        get = self.ffi.get_global_func
        self._allocate, self._from_bytes = (
            get("runtime.TVMTensorAllocWithScope"),
            get("runtime.TVMTensorCopyFromBytes"),
        )
        self._to_bytes, set_stream = get("runtime.TVMTensorCopyToBytes"), get("runtime.Device_SetStream")
        self.device = self.ffi.device("cuda", 0)
        self.stream = ctypes.c_void_p()
        self._check("cudaStreamCreate", ctypes.byref(self.stream))
        set_stream(self.device, self.stream)

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            text = self._cuda.cudaGetErrorString
            text.restype = ctypes.c_char_p
            raise RuntimeError(f"{function} failed: {text(code).decode()}")

    def describe(self) -> tuple[str, str]:
        """Name and architecture, such as ("NVIDIA H100 80GB HBM3", "sm_90a")."""
        attribute = self.ffi.get_global_func("runtime.GetDeviceAttr")
        name = str(attribute(CUDA, 0, 5))
        major, minor = str(attribute(CUDA, 0, 4)).split(".")
        return name, f"sm_{major}{minor}" + ("a" if major == "9" else "")

    def cache_bytes(self) -> int:
        """Bytes of the second-level cache."""
        found = ctypes.c_int(0)
        self._check("cudaDeviceGetAttribute", ctypes.byref(found), _L2_CACHE, 0)
        return found.value

    def free_bytes(self) -> int:
        """Bytes of memory that nobody has."""
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._check("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory of the GPU."""
        return self._allocate(self.ffi.Shape(tuple(shape)), self.ffi.dtype(dtype), self.device, None)

    def place(self, array: np.ndarray) -> Any:
        """A copy on the GPU."""
        array = np.ascontiguousarray(array)
        made = self.empty(array.shape, str(array.dtype))
        self._from_bytes(made, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return made

    def fetch(self, tensor: Any) -> np.ndarray:
        """A copy on the CPU."""
        self.wait()
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def load(self, library: Path) -> Any:
        """A library of kernels."""
        return self.ffi.load_module(str(library))

    def wait(self) -> None:
        """Until the GPU has done everything."""
        self._check("cudaDeviceSynchronize")

    def graph(self, calls: Callable[[], None]) -> Callable[[], None]:
        """What `calls` launches, as one CUDA graph."""
        calls()  # modules are loaded by their first use
        self.wait()
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cudaStreamBeginCapture", self.stream, _THREAD_LOCAL)
        calls()
        self._check("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        self._check("cudaGraphInstantiate", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        return lambda: self._check("cudaGraphLaunch", ready, self.stream)

    def seconds(self, run: Callable[[], None], rounds: int) -> list[float]:
        """Times of `run` between events, after two runs that are not counted."""
        begin, end = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cudaEventCreate", ctypes.byref(begin))
        self._check("cudaEventCreate", ctypes.byref(end))
        times = []
        for turn in range(rounds + 2):
            self._check("cudaEventRecord", begin, self.stream)
            run()
            self._check("cudaEventRecord", end, self.stream)
            self._check("cudaEventSynchronize", end)
            spent = ctypes.c_float()
            self._check("cudaEventElapsedTime", ctypes.byref(spent), begin, end)
            if turn >= 2:
                times.append(1e-3 * spent.value)
        return times

    def copy_bandwidth(self, rounds: int, size: int = 1 << 30) -> float:
        """Bytes read and written a second by a copy inside the GPU's memory."""
        source, target = self.empty([size], "uint8"), self.empty([size], "uint8")
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (target, source)]

        def run() -> None:
            self._check(
                "cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), _TO_DEVICE_FROM_DEVICE, self.stream
            )

        return 2 * size / statistics.median(self.seconds(run, rounds))
