"""nvcc or NVRTC: CUDA source to cubins, and what ptxas says about registers, spills and shared memory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from ....compiler.errors import InputError, ToolchainError
from .nvrtc import find_nvrtc

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a")
"""Architectures that kernels are written for: tensor cores with int8, float16 and asynchronous copies."""

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers a thread, bytes of local memory, of spills, and of static shared memory a
    block."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Cubin:
    """Machine code of one source: a cubin of one architecture, or a fat binary of several."""

    archs: tuple[str, ...]
    data: bytes
    resources: tuple[Resources, ...]

    @property
    def spilled(self) -> tuple[Resources, ...]:
        """Kernels that spill registers."""
        return tuple(r for r in self.resources if r.spill_stores or r.spill_loads)


def architectures(text: str) -> tuple[str, ...]:
    """The architectures of "sm_80" or "sm_80,sm_90a", in order. Raises InputError."""
    found = text.split(",")
    for arch in found:
        if arch not in ARCHS:
            raise InputError(
                "Unknown architecture of a CUDA target",
                expected=" | ".join(f"cuda:{a}" for a in ARCHS) + ", or several: cuda:sm_80,sm_90a",
                got=repr(arch),
                hint="the architecture of a GPU is its compute capability: 8.0 is sm_80, 9.0 is sm_90a",
            )
    return tuple(sorted(set(found)))


class Compiler(Protocol):
    """What makes cubins."""

    @property
    def version(self) -> str:
        """A line that is another for another compiler, a part of the keys of cached cubins."""

    def compile(self, source: str, archs: Sequence[str]) -> tuple[bytes, str]:
        """Machine code (a cubin, or a fat binary of several architectures) and ptxas' log. Raises ToolchainError."""


@dataclass(frozen=True)
class Nvcc:
    """The nvcc at a path."""

    path: str

    @property
    def version(self) -> str:
        """The line of `nvcc --version` that names the release."""
        return _nvcc_version(self.path)

    def compile(self, source: str, archs: Sequence[str]) -> tuple[bytes, str]:
        """One run of nvcc."""
        kind = ["-cubin", f"-arch={archs[0]}"]
        if len(archs) > 1:
            numbers = [a.removeprefix("sm_") for a in archs]
            kind = ["-fatbin", *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers)]
        with tempfile.TemporaryDirectory() as scratch:
            code, out = Path(scratch, "kernels.cu"), Path(scratch, "kernels.cubin")
            code.write_text(source)
            command = [
                self.path,
                *kind,
                "-O3",
                "-std=c++17",
                "-Xptxas",
                "-v",
                "-w",
                "-o",
                str(out),
                str(code),
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise ToolchainError(
                    f"nvcc does not compile the kernels for {','.join(archs)}",
                    expected="a toolkit that knows the architecture, and source it accepts",
                    got=(run.stderr or run.stdout).strip()[-4000:],
                )
            return out.read_bytes(), run.stderr


@cache
def _nvcc_version(path: str) -> str:
    out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line for line in out.splitlines() if "release" in line), out.strip())


def find_nvcc() -> Nvcc | None:
    """The nvcc of ISOFOLD_NVCC, of PATH or of CUDA_HOME."""
    asked = os.environ.get("ISOFOLD_NVCC")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which(asked or "nvcc") or (None if asked else shutil.which(f"{home}/bin/nvcc"))
    return None if found is None else Nvcc(found)


def find_compiler() -> Compiler:
    """nvcc where there is one, else NVRTC. Raises ToolchainError."""
    nvcc = find_nvcc()
    if nvcc is not None:
        return nvcc
    nvrtc, found = find_nvrtc()
    if nvrtc is not None:
        return nvrtc
    asked = os.environ.get("ISOFOLD_NVCC")
    raise ToolchainError(
        "There is neither nvcc nor NVRTC to compile CUDA kernels with",
        expected="CUDA 12.0 or later: nvcc in PATH, in CUDA_HOME, or named by ISOFOLD_NVCC; or libnvrtc of the "
        "toolkit, of the package nvidia-cuda-nvrtc, or named by ISOFOLD_NVRTC",
        got=(f"no nvcc (ISOFOLD_NVCC={asked!r})" if asked else "no nvcc") + f", {found}",
        hint="a GPU is not needed to compile; install the CUDA toolkit, or pip install nvidia-cuda-nvrtc "
        "nvidia-cuda-runtime nvidia-cuda-cccl, or compile on a machine that has it",
    )


def compile_cubin(source: str, arch: str, cache_folder: Path | None = None) -> Cubin:
    """Compile CUDA source for one architecture or several ("sm_80,sm_90a").

    cache_folder: equal sources are compiled once. Raises InputError (architecture) and ToolchainError (no compiler, or
    it refuses the source).
    """
    archs, compiler = architectures(arch), find_compiler()
    key = hashlib.sha256("\0".join([source, *archs, compiler.version]).encode()).hexdigest()[:32]
    if cache_folder is not None:
        kept, log = cache_folder / f"{key}.cubin", cache_folder / f"{key}.log"
        if kept.exists() and log.exists():
            return Cubin(archs, kept.read_bytes(), parse_resources(log.read_text()))
    data, text = compiler.compile(source, archs)
    cubin = Cubin(archs, data, parse_resources(text))
    if cache_folder is not None:
        cache_folder.mkdir(parents=True, exist_ok=True)
        for path, content in ((log, text.encode()), (kept, data)):
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(content)
            os.replace(part, path)
    return cubin


def parse_resources(log: str) -> tuple[Resources, ...]:
    """Resources of every kernel in the output of `ptxas -v`, by name and architecture."""
    parts = _ENTRY.split(log)
    result = []
    for name, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        spills, used = _SPILLS.search(text), _USED.search(text)
        if spills is None or used is None:
            continue
        shared = _SHARED.search(used[2])
        stack, stores, loads = map(int, spills.groups())
        result.append(
            Resources(name, arch, int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0)
        )
    return tuple(sorted(result, key=lambda r: (r.kernel, r.arch)))
