"""Device modules from cubins, made without a GPU.

TVM's CUDA runtime (`libtvm_runtime_cuda.so`) makes and saves modules of machine code, but needs the driver's library
to be loaded. Where there is none, a library of the same name whose functions all fail is compiled and loaded first:
nothing calls them while a module is only made and saved.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tvm

from ....compiler.errors import ToolchainError
from .device_module import CREATE, DeviceSource

_FUNCTIONS = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""


def cubin_module(source: DeviceSource, cubin: bytes) -> Any:
    """A device module of machine code for the kernels of `source`."""
    return _creator()(cubin, "cubin", source.handle, {})


@cache
def _creator() -> Any:
    """TVM's own function that makes CUDA modules. Raises ToolchainError."""
    hooked = tvm.get_global_func(CREATE, allow_missing=True)
    if hooked is None:
        _load_runtime()
        hooked = tvm.get_global_func(CREATE, allow_missing=True)
    if hooked is None:
        raise ToolchainError("TVM's CUDA runtime makes no modules", expected=f"the global function {CREATE}")
    return hooked


def prepare() -> None:
    """Load what :func:`cubin_module` needs (before anything takes TVM's function's place)."""
    _creator()


def _load_runtime() -> None:
    spec = find_spec("tvm")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [p for folder in folders for p in Path(folder).glob("lib*/libtvm_runtime_cuda.so")]
    if not found:
        raise ToolchainError(
            "This TVM has no CUDA runtime",
            expected="libtvm_runtime_cuda.so in the package tvm (apache-tvm for Linux)",
        )
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        _load_stand_in()
    try:
        ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ToolchainError(
            "TVM's CUDA runtime cannot be loaded",
            where=str(found[0]),
            expected="the CUDA runtime library (libcudart) of the version that TVM was built with",
            got=str(error),
        ) from error


def _load_stand_in() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        code, library = Path(scratch, "cuda.c"), Path(scratch, "libcuda.so.1")
        code.write_text("\n".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}" for name in _FUNCTIONS))
        compiler = shlex.split(os.environ.get("CC", "cc"))
        command = [*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(code), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise ToolchainError("A C compiler is needed to compile for CUDA", got=run.stderr.strip()[:2000])
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
