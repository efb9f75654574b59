"""Opening and running an artefact with ONNX Runtime: NumPy, ONNX Runtime and the standard library, no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ...compiler.artefact import MANIFEST, publishing, read_manifest
from ...compiler.errors import ArtefactError, InputError
from .structure import Structure, decode, flatten

MODEL, WEIGHTS, LIBRARY, REPORT, EXAMPLES = (
    "model.onnx",
    "weights.bin",
    "libisofold_ops.so",
    "report.json",
    "examples.npz",
)
_WITHOUT_LIBRARY = "without the op library packed models need ONNX Runtime 1.28 or newer"
_DAMAGED = "compile the model again, or copy the whole folder again"


@dataclass(frozen=True)
class Port:
    """An input or output: name, NumPy dtype, and shape with names for the sizes that may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def open_artefact(
    folder: str | os.PathLike[str],
    *,
    threads: int | None = None,
    library: bool | str | os.PathLike[str] = True,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    verify: bool = False,
) -> OnnxModel:
    """Open an artefact folder.

    threads: of one inference; None leaves the choice to ONNX Runtime.
    library: True uses the op library of the artefact, a path another one, False none (stock ONNX Runtime decodes
        the weights to float when it loads them).
    verify: compare the hashes of all files too, not only their sizes.
    Raises ArtefactError where files are missing, damaged or of a newer version, InputError for bad options.
    """
    if threads is not None and threads < 1:
        raise InputError("Threads must be positive", expected="None or at least 1", got=threads)
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.get("backend") != "onnx":
        raise ArtefactError(
            "The artefact is for another runtime",
            where=str(folder),
            expected="onnx",
            got=manifest.get("backend"),
        )
    verify_files(folder, manifest, hashes=verify)
    return OnnxModel(
        folder, manifest, _Settings(threads, _library_file(folder, manifest, library), tuple(providers))
    )


def verify_files(folder: Path, manifest: Mapping[str, Any], *, hashes: bool) -> None:
    """Raise ArtefactError that lists every file that is missing, has another size, or (with `hashes`) other content."""
    problems = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            size = path.stat().st_size
            kind = "truncated" if size < entry["bytes"] else "too long"
            problems.append(f"{name} is {kind}: {size} bytes instead of {entry['bytes']}")
        elif hashes and sha256_of(path) != entry["sha256"]:
            problems.append(f"{name} has another content than was written")
    if problems:
        raise ArtefactError(
            "The artefact is damaged", where=str(folder), got="; ".join(problems), hint=_DAMAGED
        )


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _library_file(
    folder: Path, manifest: Mapping[str, Any], library: bool | str | os.PathLike[str]
) -> Path | None:
    if isinstance(library, bool):
        return folder / LIBRARY if library and LIBRARY in manifest["files"] else None
    path = Path(library)
    if not path.is_file():
        raise InputError(
            "There is no such op library", where=str(path), hint="library=True uses the artefact's own"
        )
    return path


@dataclass(frozen=True)
class _Settings:
    threads: int | None
    library: Path | None
    providers: tuple[Any, ...]


def open_session(
    model: Path,
    *,
    library: Path | None,
    threads: int | None = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    prepare: Callable[[onnxruntime.SessionOptions], None] | None = None,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session; `prepare` may change its options. Raises ArtefactError."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    # From the second run of a shape on it holds a block for all activations beside the arena of the first run:
    # 4.8 MiB more for BERT-base at 128 tokens, and no time gained.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    if prepare is not None:
        prepare(options)
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise ArtefactError(
                "ONNX Runtime cannot load the op library",
                where=str(library),
                got=_first_line(error),
                hint="isofold build makes one for this machine; library=False runs without",
            ) from error
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=list(providers))
    except Exception as error:
        raise ArtefactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open the model",
            where=str(model),
            got=_first_line(error),
            hint=_DAMAGED if library is not None else f"{_DAMAGED}; {_WITHOUT_LIBRARY}",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class OnnxModel:
    """An opened artefact: call it like the module it was compiled from.

    Arguments are NumPy arrays or torch tensors, positional or by keyword; results are arrays, or tensors where a
    tensor was given. Raises InputError for arguments that do not fit, listing all of them.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], settings: _Settings) -> None:
        self.folder = folder
        self.manifest = manifest
        self._settings = settings
        self.inputs = tuple(_port(entry) for entry in manifest["inputs"])
        self.outputs = tuple(_port(entry) for entry in manifest["outputs"])
        self.session = self._open(settings.threads)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run once."""
        feed, torch = self._feed(args, kwargs)
        results: list[Any] = self._run(feed)
        if torch is not None:
            results = [torch.from_numpy(r) for r in results]
        return decode(self.manifest["results"], results)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on arrays by input name; results by output name. Raises InputError for inputs that do not fit."""
        names = [port.name for port in self.inputs]
        if set(arrays) != set(names):
            raise InputError(
                "These are not the model's inputs", expected=", ".join(names), got=", ".join(arrays)
            )
        sizes: dict[str, tuple[int, str]] = {}
        problems = [problem for port in self.inputs for problem in _misfit(port, arrays[port.name], sizes)]
        if problems:
            raise InputError("Inputs do not fit the model", got="; ".join(problems))
        results = self._run({name: np.asarray(arrays[name]) for name in names})
        return dict(zip([port.name for port in self.outputs], results, strict=True))

    @property
    def report(self) -> dict[str, Any]:
        """What the compilation did (see docs). Raises ArtefactError where the file is damaged."""
        path = self.folder / REPORT
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ArtefactError(
                "The artefact's report cannot be read", where=str(path), got=str(error), hint=_DAMAGED
            ) from error

    @property
    def library(self) -> Path | None:
        """The op library in use, None for stock ONNX Runtime."""
        return self._settings.library

    def examples(self) -> dict[str, np.ndarray]:
        """The example inputs that the model was compiled with, by name."""
        path = self.folder / EXAMPLES
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {port.name: stored[port.name] for port in self.inputs}
        except (OSError, ValueError, KeyError) as error:
            raise ArtefactError(
                "The artefact's example inputs cannot be read", where=str(path), got=str(error), hint=_DAMAGED
            ) from error

    def benchmark(
        self, *args: Any, runs: int = 50, warmup: int = 5, threads: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Latency on the given arguments (default: the example inputs) in milliseconds.

        Returns `{median_ms, q1_ms, q3_ms, min_ms, runs, threads}`. `threads` measures with another number of threads.
        """
        if runs < 1:
            raise InputError("A benchmark needs runs", expected="at least 1", got=runs)
        feed = self._feed(args, kwargs)[0] if args or kwargs else self.examples()
        changed = threads is not None and threads != self._settings.threads
        session = self._open(threads) if changed else self.session
        times = []
        for index in range(warmup + runs):
            started = time.perf_counter()
            session.run(None, feed)
            if index >= warmup:
                times.append(1e3 * (time.perf_counter() - started))
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if runs > 1 else times * 3
        return {
            "median_ms": median,
            "q1_ms": q1,
            "q3_ms": q3,
            "min_ms": min(times),
            "runs": runs,
            "threads": threads if threads is not None else self._settings.threads,
        }

    def profile(self, *args: Any, runs: int = 10, **kwargs: Any) -> list[dict[str, Any]]:
        """Median time of every node that ran, `[{name, op, microseconds, outputs}]` in the order of execution.

        Names of isofold's operators are those of the program's nodes (`report["layers"][i]["packed"]`); outputs are the
        shapes of the tensors it made.
        """
        feed = self._feed(args, kwargs)[0] if args or kwargs else self.examples()
        with tempfile.TemporaryDirectory(prefix="isofold-profile-") as folder:

            def prepare(options: onnxruntime.SessionOptions) -> None:
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(folder) / "profile")

            session = self._open(self._settings.threads, prepare)
            for _ in range(runs + 1):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        spent: dict[tuple[str, str], list[float]] = {}
        shapes: dict[tuple[str, str], list[list[int]]] = {}
        for event in events:
            name = event.get("name", "")
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                key = (name.removesuffix("_kernel_time"), event["args"]["op_name"])
                spent.setdefault(key, []).append(float(event["dur"]))
                made = event["args"].get("output_type_shape") or []
                shapes[key] = [list(shape) for entry in made for shape in entry.values()]
        return [
            {
                "name": name,
                "op": op,
                "microseconds": statistics.median(times[1:] or times),
                "outputs": shapes[name, op],
            }
            for (name, op), times in spent.items()
        ]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Copy the artefact to `folder`. Raises ArtefactError."""
        with publishing(Path(folder), overwrite=overwrite) as beside:
            for name in (*self.manifest["files"], REPORT, EXAMPLES, MANIFEST):
                shutil.copyfile(self.folder / name, beside / name)
            for extra in self.folder.glob("*.html"):
                shutil.copyfile(extra, beside / extra.name)

    def _open(
        self, threads: int | None, prepare: Callable[[onnxruntime.SessionOptions], None] | None = None
    ) -> onnxruntime.InferenceSession:
        return open_session(
            self.folder / MODEL,
            library=self._settings.library,
            threads=threads,
            providers=self._settings.providers,
            prepare=prepare,
        )

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            results: list[np.ndarray] = self.session.run(None, feed)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise InputError(
                "ONNX Runtime failed on these inputs",
                got=f"{_first_line(error)} (inputs: {shapes})",
                hint="sizes must lie in the ranges that the model was captured with, ids inside their tables",
            ) from error
        return results

    def _feed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
        arguments = self.manifest["arguments"]
        given = self._by_name(arguments, args, kwargs)
        arrays: list[Any] = [None] * len(self.inputs)
        problems: list[str] = []
        torch = sys.modules.get("torch")
        seen: list[Any] = []

        def take(index: int, where: str, value: Any) -> None:
            if torch is not None and isinstance(value, torch.Tensor):
                seen.append(torch)
                try:
                    value = value.detach().cpu().numpy()
                except TypeError:
                    problems.append(f"{where}: NumPy has no {value.dtype}")
                    return
            if not isinstance(value, (np.ndarray, np.generic)):
                problems.append(f"{where}: expected an array, got {type(value).__name__}")
                return
            arrays[index] = np.asarray(value)

        for name, structure in arguments:
            flatten(structure, given[name], name, take)
        sizes: dict[str, tuple[int, str]] = {}
        for port, array in zip(self.inputs, arrays, strict=True):
            if array is not None:
                problems.extend(_misfit(port, array, sizes))
        if problems:
            raise InputError("Inputs do not fit the model", got="; ".join(problems))
        feed = {
            p.name: np.ascontiguousarray(a) if a.ndim else a for p, a in zip(self.inputs, arrays, strict=True)
        }
        return feed, (seen[0] if seen else None)

    def _by_name(
        self, arguments: Sequence[tuple[str, Structure]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        names = [name for name, _ in arguments]
        # Inputs that were captured by keyword may be given by position too, in the order of the capture.
        given = dict(zip(names, args, strict=False))
        unknown = sorted(set(kwargs) - set(names))
        twice = sorted(set(kwargs) & set(given))
        given.update(kwargs)
        # A constant that was compiled in need not be repeated.
        for name, structure in arguments:
            if name not in given and "constant" in structure:
                given[name] = structure["constant"]
        missing = [name for name in names if name not in given]
        problems = [
            f"{len(args)} positional arguments for {len(names)}" if len(args) > len(names) else "",
            f"unknown: {', '.join(unknown)}" if unknown else "",
            f"given twice: {', '.join(twice)}" if twice else "",
            f"missing: {', '.join(missing)}" if missing else "",
        ]
        if any(problems):
            raise InputError(
                "The arguments are not those of the model",
                expected=f"({', '.join(names)})",
                got="; ".join(p for p in problems if p),
            )
        return given


def _misfit(port: Port, array: np.ndarray, sizes: dict[str, tuple[int, str]]) -> list[str]:
    """What is wrong with an input; `sizes` collects the named sizes seen so far."""
    problems = []
    if array.dtype.name != port.dtype:
        problems.append(f"{port.name}: expected {port.dtype}, got {array.dtype.name}")
    fits = len(array.shape) == len(port.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(port.shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, port.shape))
        return [*problems, f"{port.name}: expected shape [{wanted}], got {list(array.shape)}"]
    for want, have in zip(port.shape, array.shape, strict=True):
        if isinstance(want, str) and want.isidentifier():
            first, where = sizes.setdefault(want, (have, port.name))
            if first != have:
                problems.append(f"{port.name}: {want} is {have}, but {first} in {where}")
    return problems


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(entry["name"], entry["dtype"], tuple(entry["shape"]))
