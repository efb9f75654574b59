"""NVRTC: CUDA source to cubins through its library, where there is no nvcc.

The library comes with the toolkit and with the package `nvidia-cuda-nvrtc`; the headers that kernels include
(`cuda_fp16.h` and what it includes) with the toolkit, or with `nvidia-cuda-runtime` and `nvidia-cuda-cccl`. NVRTC makes
a cubin of one architecture; several become a fat binary here (:func:`fat_binary`).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....compiler.errors import ToolchainError

HEADER = "cuda_fp16.h"
ASKED = "ISOFOLD_NVRTC"
"""Variable that names the library."""


@dataclass(frozen=True)
class Nvrtc:
    """The library, and the folders of the headers it reads."""

    path: str
    includes: tuple[str, ...]

    @property
    def version(self) -> str:
        """The compiler's version line, a part of the keys of cached cubins."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        _load(self.path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"

    def compile(self, source: str, archs: Sequence[str]) -> tuple[bytes, str]:
        """Machine code (a cubin, or a fat binary of several) and ptxas' log. Raises ToolchainError."""
        made = [self._cubin(source, arch) for arch in archs]
        log = "\n".join(text for _, text in made)
        cubins = [data for data, _ in made]
        return (cubins[0] if len(cubins) == 1 else fat_binary(dict(zip(archs, cubins, strict=True)))), log

    def _cubin(self, source: str, arch: str) -> tuple[bytes, str]:
        library = _load(self.path)
        options = [
            f"-arch={arch}",
            "-std=c++17",
            "--ptxas-options=-v",
            "-w",
            *(f"-I{i}" for i in self.includes),
        ]
        program = ctypes.c_void_p()
        code = library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        )
        if code:
            raise ToolchainError("NVRTC does not start", got=f"error {code} of {self.path}")
        try:
            given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            code = library.nvrtcCompileProgram(program, len(options), given)
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            text = log.rstrip(b"\0").decode(errors="replace")
            if code:
                raise ToolchainError(
                    f"NVRTC does not compile the kernels for {arch}",
                    expected="a library that knows the architecture, and source it accepts",
                    got=text.strip()[-4000:] or f"error {code} of {self.path}",
                )
            return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), text
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))


def _load(path: str) -> ctypes.CDLL:
    """The library, after the one beside it that it opens by name alone. Raises OSError."""
    for beside in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")) if os.sep in path else ():
        ctypes.CDLL(str(beside), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def _read(size_of: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def find_nvrtc() -> tuple[Nvrtc | None, str]:
    """NVRTC with its headers, or None; and what was found, for a message."""
    path = next(_libraries(), None)
    if path is None:
        asked = os.environ.get(ASKED)
        return None, f"no NVRTC ({ASKED}={asked!r})" if asked else "no NVRTC"
    folders = [folder for folder in _header_folders() if folder.is_dir()]
    if not any((folder / HEADER).exists() for folder in folders):
        return None, f"NVRTC at {path}, but no {HEADER} (nvidia-cuda-runtime and nvidia-cuda-cccl bring it)"
    includes = [part for folder in folders for part in (folder, folder / "cccl") if part.is_dir()]
    return Nvrtc(path, tuple(map(str, includes))), f"NVRTC at {path}"


def _libraries() -> Iterator[str]:
    """Paths and names of the library that load."""
    asked = os.environ.get(ASKED)
    if asked:
        candidates = [asked]
    else:
        found = [root.glob(f"{lib}/libnvrtc.so*") for root in _roots() for lib in ("lib64", "lib")]
        paths = [str(path) for each in found for path in sorted(each)]
        candidates = [*paths, ctypes.util.find_library("nvrtc") or ""]
    for candidate in filter(None, candidates):
        try:
            _load(candidate)
        except OSError:
            continue
        yield candidate


def _roots() -> Iterator[Path]:
    """Folders of toolkits, then those of NVIDIA's packages."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    yield Path(home)
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations if spec else None) or ():
        yield from sorted(p for p in Path(place).iterdir() if p.is_dir())


def _header_folders() -> Iterator[Path]:
    for root in _roots():
        yield root / "include"


_FAT_MAGIC, _ELF, _ENTRY_VERSION, _ENTRY_BYTES = 0xBA55ED50, 2, 0x101, 64
_LINUX_64, _SPECIFIC = 0x11, 0x100000
"""Flags of an entry: 64 bits of Linux; code that runs on this architecture alone (sm_90a)."""


def fat_binary(cubins: dict[str, bytes]) -> bytes:
    """One fat binary of cubins by architecture, uncompressed, as nvcc writes it."""
    body = b""
    for arch, data in cubins.items():
        number = arch.removeprefix("sm_")
        flags = _LINUX_64 | (0 if number.isdigit() else _SPECIFIC)
        padded = data + bytes(-len(data) % 8)
        body += struct.pack("<HHIQQ", _ELF, _ENTRY_VERSION, _ENTRY_BYTES, len(padded), 0)
        body += struct.pack("<HHIIIQQQ", 8, 1, int(number.rstrip("af")), 0, 0, flags, 0, 0) + padded
    return struct.pack("<IHHQ", _FAT_MAGIC, 1, 16, len(body)) + body
