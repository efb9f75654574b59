"""Running generated CUDA source on the CPU (emulator.h), through the same host functions that launch it on a GPU.

    module = emulated({"double": function})
    module["double"](x, y)                  # tensors of the CPU

The source is compiled with the C++ compiler for the emulator's CUDA; each kernel becomes a function of TVM's calling
convention, and the library takes the place of the cubin under the host module. The grid, the branches on symbolic
sizes and the launch parameters are therefore those of the GPU. Device functions that differ by architecture (FP8
products) are those of sm_89, or of ISOFOLD_EMULATOR_ARCH=800 or 900. What differs: tensors are the CPU's, and matrix
products follow PTX's tables in float32 or int32 arithmetic, in the order of their inputs.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from ....compiler.errors import ToolchainError
from .device_module import DeviceSource, KernelInfo, build_kernels, creating, target_for, with_header

HERE = Path(__file__).parent
ARCH = "sm_80"
CPU = 1
"""DLPack's code of the CPU."""

_GLUE = """
#include <type_traits>
#include <utility>
struct IsoAny { int32_t type, unused; union { int64_t i; double f; void* p; }; };
template <class P> static P iso_argument(const IsoAny& a) {
  if constexpr (std::is_pointer_v<P>) return (P)a.p;
  else if constexpr (std::is_floating_point_v<P>) return (P)a.f;
  else return (P)a.i;
}
template <class... P, size_t... I>
static void iso_run(void (*kernel)(P...), const IsoAny* args, uint3_ grid, uint3_ threads, std::index_sequence<I...>) {
  isofold_emulator::launch(grid, threads, [&] { kernel(iso_argument<P>(args[I])...); });
}
template <class... P>
static void iso_run(void (*kernel)(P...), const IsoAny* args, uint3_ grid, uint3_ threads) {
  iso_run(kernel, args, grid, threads, std::index_sequence_for<P...>());
}
"""


def emulated(functions: dict[str, tirx.PrimFunc], folder: Path) -> Any:
    """The host module of these kernels with the emulator under it.

    folder: for the source and the library; equal sources are compiled once.
    """
    with creating(emulator_library(folder)):
        return build_kernels(functions, target_for(ARCH, CPU))


def emulator_library(folder: Path) -> Callable[[DeviceSource], Any]:
    """A function for `creating`: the module of a source under the emulator."""

    def create(source: DeviceSource) -> Any:
        return tvm.runtime.load_module(str(compile_emulated(source, folder)))

    return create


def compile_emulated(source: DeviceSource, folder: Path) -> Path:
    """Compile a source for the emulator; the path of the shared library. Raises ToolchainError where g++ refuses."""
    body = source.code[source.code.index('extern "C" __global__') :]  # without the types of CUDA's headers
    dynamic = r"extern __shared__ (?:\w+\(\d+\) )?([\w ]+) (\w+)\[\];"
    body = re.sub(dynamic, r"\1* \2 = (\1*)isofold_emulator::dynamic_memory;", body)
    body = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", body)  # where C++ wants it
    text = "\n".join(
        [
            f"#define ISOFOLD_EMULATE {int(os.environ.get('ISOFOLD_EMULATOR_ARCH', '890'))}",
            '#include "emulator.h"',
            with_header(body),
            _GLUE,
            *map(_wrapper, source.kernels),
        ]
    )
    headers = "".join((HERE / name).read_text() for name in ("emulator.h", "emulator.cc"))
    digest = hashlib.sha256((text + headers).encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest}.so"
    if library.exists():
        return library
    # Names of its own: another process may be compiling the same.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
        code, made = Path(scratch, f"{digest}.cc"), Path(scratch, f"{digest}.so")
        code.write_text(text)
        command = [
            os.environ.get("CXX", "g++"), "-std=c++17", "-fno-strict-aliasing", "-O1", "-w", "-shared", "-fPIC",
            f"-I{HERE}", str(code), str(HERE / "emulator.cc"), "-o", str(made),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise ToolchainError(
                "Generated CUDA source does not compile for the emulator",
                expected="a C++17 compiler in CXX (g++)",
                got=run.stderr.strip()[:4000],
            )
        os.replace(made, library)
    return library


def _wrapper(kernel: KernelInfo) -> str:
    """A kernel as a function of TVM's calling convention: arguments, then launch parameters."""
    sizes = {f"{kind}Idx.{axis}": "1" for kind in ("block", "thread") for axis in "xyz"}
    for i, tag in enumerate(kernel.launch):
        if tag in sizes:
            sizes[tag] = f"(unsigned)args[{len(kernel.arguments) + i}].i"
    dims = list(sizes.values())
    return (
        f'extern "C" int __tvm_ffi_{kernel.name}(void*, const IsoAny* args, int, IsoAny* result) {{\n'
        f"  iso_run({kernel.name}, args, {{{', '.join(dims[:3])}}}, {{{', '.join(dims[3:])}}});\n"
        "  result->type = 0;\n  result->i = 0;\n  return 0;\n}"
    )
