"""nvcc: CUDA source to cubins, and what ptxas says about registers, spills and shared memory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ....compiler.errors import InputError, ToolchainError

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a")
"""Architectures that kernels are written for: tensor cores with int8, float16 and asynchronous copies."""

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers a thread, bytes of local memory, of spills, and of static shared memory a
    block."""

    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Cubin:
    """Machine code of one source for one architecture."""

    arch: str
    data: bytes
    resources: tuple[Resources, ...]

    @property
    def spilled(self) -> tuple[Resources, ...]:
        """Kernels that spill registers."""
        return tuple(r for r in self.resources if r.spill_stores or r.spill_loads)


def check_arch(arch: str) -> str:
    """`arch`, or InputError where kernels are not written for it."""
    if arch not in ARCHS:
        raise InputError(
            "Unknown architecture of a CUDA target",
            expected=" | ".join(f"cuda:{a}" for a in ARCHS),
            got=repr(arch),
            hint="the architecture of a GPU is its compute capability: 8.0 is sm_80, 9.0 is sm_90a",
        )
    return arch


def find_nvcc() -> Path:
    """The nvcc of ISOFOLD_NVCC, of PATH or of CUDA_HOME. Raises ToolchainError."""
    asked = os.environ.get("ISOFOLD_NVCC")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which(asked or "nvcc") or (None if asked else shutil.which(f"{home}/bin/nvcc"))
    if found is None:
        raise ToolchainError(
            "There is no nvcc to compile CUDA kernels with",
            expected="nvcc of CUDA 12.0 or later in PATH, in CUDA_HOME, or named by ISOFOLD_NVCC",
            got=f"ISOFOLD_NVCC={asked!r}" if asked else "none",
            hint="a GPU is not needed to compile; install the CUDA toolkit, or compile on a machine that has it",
        )
    return Path(found)


@cache
def nvcc_version(nvcc: Path) -> str:
    """The compiler's version line, a part of the keys of cached cubins."""
    out = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    return next((line for line in out.splitlines() if "release" in line), out.strip())


def compile_cubin(source: str, arch: str, cache_folder: Path | None = None) -> Cubin:
    """Compile CUDA source to a cubin.

    cache_folder: equal sources are compiled once. Raises InputError (architecture) and ToolchainError (no nvcc, or
    it refuses the source).
    """
    nvcc = find_nvcc()
    key = hashlib.sha256("\0".join([source, check_arch(arch), nvcc_version(nvcc)]).encode()).hexdigest()[:32]
    if cache_folder is not None:
        kept, log = cache_folder / f"{key}.cubin", cache_folder / f"{key}.log"
        if kept.exists() and log.exists():
            return Cubin(arch, kept.read_bytes(), parse_resources(log.read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        code, out = Path(scratch, "kernels.cu"), Path(scratch, "kernels.cubin")
        code.write_text(source)
        command = [str(nvcc), "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas", "-v", "-w"]
        run = subprocess.run(
            [*command, "-o", str(out), str(code)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise ToolchainError(
                f"nvcc does not compile the kernels for {arch}",
                expected="a toolkit that knows the architecture, and source it accepts",
                got=(run.stderr or run.stdout).strip()[-4000:],
            )
        cubin = Cubin(arch, out.read_bytes(), parse_resources(run.stderr))
    if cache_folder is not None:
        cache_folder.mkdir(parents=True, exist_ok=True)
        for path, content in ((log, run.stderr.encode()), (kept, cubin.data)):
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(content)
            os.replace(part, path)
    return cubin


def parse_resources(log: str) -> tuple[Resources, ...]:
    """Resources of every kernel in the output of `nvcc -Xptxas -v`, by name."""
    parts = _ENTRY.split(log)
    result = []
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        spills, used = _SPILLS.search(text), _USED.search(text)
        if spills is None or used is None:
            continue
        shared = _SHARED.search(used[2])
        stack, stores, loads = map(int, spills.groups())
        result.append(Resources(name, int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0))
    return tuple(sorted(result, key=lambda r: r.kernel))
