"""The op library and its host as objects that are linked into an executable.

The archive is built beside the shared op library, from the same objects (`runtimes/onnx/oplib/build.py`); the host is
one C++ file (`host.cc`). Both are cached by a hash of their sources.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ...compiler.errors import ToolchainError
from ...compiler.processor import cache_folder
from ..onnx.oplib.build import archive_path, require_tools

_HERE = Path(__file__).resolve().parent
_ABI = _HERE.parent / "onnx" / "oplib"
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
LINK_FLAGS = ("-Wl,--exclude-libs,ALL", "-Wl,-z,nodelete", "-Wl,--gc-sections", "-pthread")
"""Threads of TVM's pool outlive executables and free their scratch memory when they end: the code is never unmapped."""


def host_objects(progress: Callable[[str], None] | None = None, force: bool = False) -> list[Path]:
    """The object of the host and the archive of the op library, built where they are missing (force: anew).

    Raises ToolchainError.
    """
    counted = None if progress is None else lambda w, d, t: progress(f"{w} ({d}/{t})")
    return [_host(force), archive_path(progress=counted, force=force)]


def _host(force: bool) -> Path:
    compiler = require_tools()
    sources = [_HERE / "host.cc", _ABI / "ort_abi.h"]
    digest = hashlib.sha256(compiler.encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = cache_folder() / f"isofold_host-{digest.hexdigest()[:16]}.o"
    if path.exists() and not force:
        return path
    found = find_spec("tvm_ffi")
    if found is None or not found.submodule_search_locations:
        raise ToolchainError(
            "apache-tvm-ffi is not installed", hint="pip install apache-tvm-ffi==0.1.14.post1"
        )
    include = Path(next(iter(found.submodule_search_locations))) / "include"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [
            *shlex.split(compiler),
            *_FLAGS,
            f"-I{include}",
            f"-I{_ABI}",
            "-c",
            str(sources[0]),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = "\n".join(done.stderr.strip().splitlines()[:30])
            raise ToolchainError("Compiling host.cc failed", where=shlex.join(command), got=f"\n{lines}")
        os.replace(made, path)
    return path
