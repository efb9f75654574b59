"""Building and finding the op library: cache, lock, missing tools, what importing it pulls in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isofold.compiler.errors import ToolchainError
from isofold.runtimes.onnx.oplib import build as module

from ....processes import PATIENCE

BUILD = "from isofold.runtimes.onnx.oplib import build as module\n"
FAKE = """
import os, time, sys
def fake(scratch, compiler, progress, settings):
    with open(os.environ["LOG"], "a") as log:
        log.write("built\\n")
    time.sleep(1)
    made = scratch / "made.so"
    made.write_bytes(b"library")
    made.with_suffix(".a").write_bytes(b"archive")
    return made
module._compile = fake
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("ISOFOLD_OPS_LIBRARY", "ISOFOLD_CACHE", "CXX")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True
    )


def test_importing_it_imports_neither_torch_nor_tvm() -> None:
    done = python(BUILD + "import sys; assert not {'torch', 'tvm', 'numpy', 'rich'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_missing_tools_are_named_with_what_to_install(tmp_path: Path) -> None:
    hide = "module.util.find_spec = lambda name: None\n"
    done = python(BUILD + hide + "module.library_path()", CXX="no-such-g++", ISOFOLD_CACHE=str(tmp_path))
    assert done.returncode != 0
    assert "building it needs tools that are not installed" in done.stderr
    assert "no the C++ compiler (no-such-g++) and no TVM" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert "pip install" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_tools_a_library_of_the_same_sources_is_found(tmp_path: Path) -> None:
    earlier = tmp_path / f"libisofold_ops-{module._source_hash()}-01234567.so"
    earlier.write_bytes(b"library")
    done = python(BUILD + "print(module.library_path())", CXX="no-such-g++", ISOFOLD_CACHE=str(tmp_path))
    assert done.stdout.strip() == str(earlier), done.stderr


def test_two_processes_build_once(tmp_path: Path) -> None:
    code = BUILD + FAKE + "print(module.library_path())"
    environment = {**os.environ, "ISOFOLD_CACHE": str(tmp_path / "cache"), "LOG": str(tmp_path / "log")}
    environment.pop("ISOFOLD_OPS_LIBRARY", None)
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    paths = {process.communicate(timeout=PATIENCE)[0].strip() for process in running}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == b"library"
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scratch: Path, compiler: str, progress: module.Progress, settings: object) -> Path:
        (scratch / "half.o").write_bytes(b"half")
        raise ToolchainError("Linking the op library failed", where="g++", got="no space")

    monkeypatch.setattr(module, "_compile", broken)
    with pytest.raises(ToolchainError, match="Linking the op library failed"):
        module.build(tmp_path / "x.so")
    assert not list(tmp_path.iterdir())


def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    with pytest.raises(
        ToolchainError, match=r"x86-64 Linux only[\s\S]*linux on aarch64[\s\S]*run without it"
    ):
        module.build(tmp_path / "x.so")


def test_old_builds_are_forgotten(tmp_path: Path) -> None:
    for i in range(12):
        old = tmp_path / f"libisofold_ops-{i:016x}-01234567.so"
        old.write_bytes(b"old")
        os.utime(old, (1000 + i, 1000 + i))
    done = python(
        BUILD + FAKE + "print(module.library_path())", ISOFOLD_CACHE=str(tmp_path), LOG=str(tmp_path / "log")
    )
    left = sorted(p.name for p in tmp_path.glob("*.so"))
    assert len(left) == 8
    assert Path(done.stdout.strip()).name in left
    assert f"libisofold_ops-{4:016x}-01234567.so" not in left


def test_a_compiler_error_is_shown(tmp_path: Path) -> None:
    (tmp_path / "x.cc").write_text("no_such_type x;")
    command = ["g++", "-c", str(tmp_path / "x.cc"), "-o", str(tmp_path / "x.o")]
    with pytest.raises(ToolchainError, match=r"Compiling x failed[\s\S]*no_such_type"):
        module._run(command, "Compiling x")


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_set() -> None:
    done = python(BUILD + "module.library_path()", ISOFOLD_CACHE="/dev/null/cache")
    assert done.returncode != 0
    assert "The op library cannot be written" in done.stderr
    assert "set ISOFOLD_CACHE to a writable directory" in done.stderr


def test_a_named_library_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "mine.so"
    monkeypatch.setenv("ISOFOLD_OPS_LIBRARY", str(named))
    with pytest.raises(ToolchainError, match="There is no op library at this path"):
        module.library_path()
    named.write_bytes(b"library")
    assert module.library_path() == named


@pytest.mark.slow
def test_a_script_without_a_main_guard_can_build(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        BUILD
        + f"steps = []\nmodule.build({str(tmp_path / 'ops.so')!r}, progress=lambda *s: steps.append(s))\n"
        "assert steps[-1][1] == steps[-1][2] == len(steps), steps\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    code = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).isofold_ops_info; f.restype = ctypes.c_char_p; print(f())"
    command = [sys.executable, "-c", code, str(tmp_path / "ops.so")]
    assert (
        "isofold_ops version=" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
