"""Build the op library once per machine and find it again.

TVM compiles the kernels to objects (`runtimes.kernels`), g++ the shim beside this file, and the linker makes
one shared library that needs neither TVM nor Python. It is kept in the user's cache under a name made of a hash of
all sources, the versions of both compilers and the values of the kernels' knobs, so that a change of any of them
builds anew and nothing stale is ever loaded. A file is written beside its final name and renamed, under a lock: two
processes build once.

Importing this module imports neither torch nor TVM; TVM is imported when something has to be built.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module, metadata, util
from pathlib import Path

from ....compiler.errors import ToolchainError
from ....compiler.processor import cache_folder
from ...kernels.knobs import Settings
from ...tuning.selection import settings_for_build

__all__ = ["Progress", "archive_path", "build", "library_path", "require_tools"]

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

_HERE = Path(__file__).resolve().parent
_KERNELS = _HERE.parents[1] / "kernels"
_HADAMARD_ORDERS = _HERE.parents[2] / "compiler" / "hadamard_orders.py"
_PACKAGED = _HERE / "lib" / "libisofold_ops.so"
_MODULES = (
    "quantize",
    "linear",
    "linear_float",
    "outliers",
    "coded",
    "fp8",
    "codebook",
    "codebook_tables",
    "dense",
    "norm",
    "attention",
    "attention_cache",
    "rotary",
    "elementwise",
    "embedding",
    "conv",
    "hadamard",
    "sparse",
    "sparse_many",
    "sparse_windows",
    "sparse_groups",
    "sparse_blocks",
    "sparse_int4",
    "sparse_panels",
)
_FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-Wall", "-Wextra",
)  # fmt: skip
# Threads of ONNX Runtime outlive sessions and free their scratch memory when they end: never unmap the code.
_LINK_FLAGS = ("-shared", "-Wl,-z,nodelete", "-Wl,--as-needed", "-Wl,--no-undefined", "-pthread", "-s")


def library_path(progress: Progress | None = None) -> Path:
    """The op library: the file named by `ISOFOLD_OPS_LIBRARY`, else the one inside the installed package (unless
    the kernels were tuned on this machine), else the cached one, else built now.

    Raises:
        ToolchainError: it has to be built, and g++ or TVM is missing or fails; or the named file is not there.
    """
    if named := os.environ.get("ISOFOLD_OPS_LIBRARY"):
        if not Path(named).is_file():
            raise ToolchainError("There is no op library at this path", where=f"ISOFOLD_OPS_LIBRARY={named}")
        return Path(named)
    if _PACKAGED.exists() and settings_for_build() == settings_for_build(own=False):
        return _PACKAGED
    cached = _cached()
    if cached is None and _PACKAGED.exists() and (_compiler_version() == "none" or not _has_tvm()):
        return _PACKAGED  # tuned, but nothing to build with
    return cached if cached is not None else build(progress=progress)


def archive_path(progress: Progress | None = None, force: bool = False) -> Path:
    """The objects of the op library in one archive, for hosts that link them in; built now where there is none.

    Raises ToolchainError as `library_path` does.
    """
    return build(force=force, progress=progress).with_suffix(".a")


def build(
    out: Path | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    settings: Mapping[str, Settings] | None = None,
) -> Path:
    """Build the op library.

    Args:
        out: where to write it; None: the cache, where an up-to-date one is reused.
        force: build even if there is an up-to-date one.
        progress: told about each object; None: a progress bar on a terminal.
        settings: values of the kernels' knobs by instruction set; None: the best ones for this processor that were
            measured here or are shipped; with `out`, which others may run, the shipped ones.

    Returns:
        the library's path.

    Raises:
        ToolchainError: g++ or TVM is missing (says what to install), or one of them fails (with its output).
    """
    if settings is None:
        settings = settings_for_build(own=out is None)
    path = cache_folder() / _file_name(settings) if out is None else Path(out)
    if not force and out is None and _is_complete(path):
        return path
    compiler = require_tools()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache_folder() / "build.lock") if out is None else nullcontext():
            if not force and out is None and _is_complete(path):
                return path  # another process built it while this one waited
            with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as scratch:
                if progress is not None:
                    made = _compile(Path(scratch), compiler, progress, settings)
                else:
                    with _progress_bar() as bar:
                        made = _compile(Path(scratch), compiler, bar, settings)
                if out is None:
                    os.replace(made.with_suffix(".a"), path.with_suffix(".a"))
                os.replace(made, path)
            if out is None:
                _forget_old_builds(keep=8)
    except OSError as error:
        raise ToolchainError(
            "The op library cannot be written",
            where=str(path),
            got=str(error),
            hint="set ISOFOLD_CACHE to a writable directory with 50 MB free",
        ) from error
    return path


def _is_complete(path: Path) -> bool:
    """Whether a library in the cache is there with the archive of its objects."""
    return path.exists() and path.with_suffix(".a").exists()


def _cached() -> Path | None:
    exact = cache_folder() / _file_name(settings_for_build())
    if exact.exists():
        return exact
    if shutil.which(_compiler()) is None or not _has_tvm():
        # Without the tools the second half of the name is unknown; the sources are what must match.
        matches = sorted(cache_folder().glob(f"libisofold_ops-{_source_hash()}-*.so"))
        return matches[0] if matches else None
    return None


def _forget_old_builds(keep: int) -> None:
    """Remove all but the newest builds; a process that has loaded one keeps its mapping."""
    builds = sorted(cache_folder().glob("libisofold_ops-*.so"), key=lambda p: p.stat().st_mtime)
    for path in builds[:-keep]:
        path.unlink(missing_ok=True)
        path.with_suffix(".a").unlink(missing_ok=True)


def _text(settings: Mapping[str, Settings]) -> str:
    return json.dumps({isa: chosen.to_json() for isa, chosen in sorted(settings.items())})


def _file_name(settings: Mapping[str, Settings]) -> str:
    facts = (_tvm_version(), _compiler_version(), _text(settings))
    tools = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    return f"libisofold_ops-{_source_hash()}-{tools[:8]}.so"


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256()
    sources = [
        *_KERNELS.glob("*.py"),
        *_KERNELS.glob("*.h"),
        *_HERE.glob("*.h"),
        *_HERE.glob("*.cc"),
        _HADAMARD_ORDERS,
        Path(__file__),
    ]
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


@lru_cache(maxsize=1)
def _compiler_version() -> str:
    try:
        command = [*shlex.split(_compiler()), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _has_tvm() -> bool:
    return util.find_spec("tvm") is not None


def _tvm_version() -> str:
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        return "none"


def require_tools() -> str:
    """The C++ compiler. Raises ToolchainError, which says what to install, where it or TVM is missing."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise ToolchainError(
            "The op library is for x86-64 Linux only",
            got=f"{sys.platform} on {platform.machine()}",
            hint="artefacts run without it: ONNX Runtime then uses the operators' function bodies",
        )
    missing, hints = [], []
    if _compiler_version() == "none":
        missing.append(f"the C++ compiler ({_compiler()})")
        hints.append("apt-get install g++ (or your distribution's package), or set CXX")
    if not _has_tvm():
        missing.append("TVM")
        hints.append("pip install 'isofold[build]'")
    if missing:
        raise ToolchainError(
            "The op library is not built yet, and building it needs tools that are not installed",
            expected="g++ and apache-tvm, or a wheel of isofold that carries the library",
            got=f"no {' and no '.join(missing)}",
            hint="; ".join(hints),
        )
    return _compiler()


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        shown = "\n".join(lines[:30])
        raise ToolchainError(f"{what} failed", where=shlex.join(command), got=f"\n{shown}")


def _compile(scratch: Path, compiler: str, progress: Progress, settings: Mapping[str, Settings]) -> Path:
    (scratch / "knobs.json").write_text(_text(settings))
    sources = sorted(_HERE.glob("*.cc"))
    groups = _compile_kernels(scratch, len(sources) + 1, progress)
    total = groups + len(sources) + 1
    prefix = shlex.split(compiler)
    define = f'-DISOFOLD_OPS_VERSION="{_source_hash()}"'
    includes = [f"-I{scratch}", f"-I{_KERNELS}"]
    shims = []
    for done, source in enumerate(sources, 1):
        target = scratch / f"shim_{source.stem}.o"
        arguments = [*_FLAGS, define, *includes, "-c", str(source), "-o", str(target)]
        _run([*prefix, *arguments], f"Compiling {source.name}")
        progress(source.name, groups + done, total)
        shims.append(str(target))
    library, exports = scratch / "libisofold_ops.so", scratch / "exports"
    exports.write_text("{ global: RegisterCustomOps; isofold_ops_info; local: *; };\n")
    # Objects of the lowest instruction set first: each carries weak float16 helpers, and the first ones win.
    objects = sorted(map(str, scratch.glob("*_v3.o"))) + sorted(map(str, scratch.glob("*_v4.o")))
    link = [*objects, *shims, *_LINK_FLAGS, f"-Wl,--version-script={exports}", "-o", str(library)]
    _run([*prefix, *link], "Linking the op library")
    _run(
        ["ar", "rcsD", str(library.with_suffix(".a")), *objects, *shims],
        "Collecting the op library's objects",
    )
    progress(library.name, total, total)
    return library


def _compile_kernels(scratch: Path, steps_after: int, progress: Progress) -> int:
    """Compile the kernels in a process of their own; returns the number of objects.

    The workers of a process pool import the main module again. That must not be the caller's script, which
    may have no guard and would start a second build that waits for this one for ever.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", __name__, str(scratch)]
    groups = 0
    with (scratch / "kernels.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                done, count, what = line.rstrip("\n").split(" ", 2)
                groups = int(count)
                progress(what, int(done), groups + steps_after)
            failed = process.wait() != 0
        finally:
            process.kill()
        if failed:
            log.seek(0)
            raise ToolchainError("TVM could not compile the kernels", got="\n" + log.read().strip()[-3000:])
    return groups


def _kernels_main(scratch: Path) -> None:
    codegen = import_module("...kernels.codegen", __package__)
    kernels = [k for name in _MODULES for k in import_module(f"...kernels.{name}", __package__).KERNELS]
    (scratch / "hadamard_signs.h").write_text(
        import_module("...kernels.hadamard", __package__).signs_header()
    )
    chosen = json.loads((scratch / "knobs.json").read_text())
    codegen.build_objects(
        kernels,
        scratch,
        lambda what, done, total: print(done, total, what, flush=True),
        settings={isa: Settings(values) for isa, values in chosen.items()},
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    if not sys.stderr.isatty() or util.find_spec("rich") is None:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Building the op library (once per machine)", total=None)
        yield lambda what, done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    _kernels_main(Path(sys.argv[1]))
