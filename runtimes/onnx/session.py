"""Opening and running an artefact with ONNX Runtime: NumPy, ONNX Runtime and the standard library, no torch."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ...compiler.errors import ArtefactError, InputError
from ...compiler.opened import DAMAGED, OpenedModel, checked_manifest

MODEL, WEIGHTS, LIBRARY = "model.onnx", "weights.bin", "libisofold_ops.so"
_WITHOUT_LIBRARY = "without the op library packed models need ONNX Runtime 1.28 or newer"


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
    folder = Path(folder)
    manifest = checked_manifest(folder, backend="onnx", threads=threads, verify=verify)
    return OnnxModel(
        folder, manifest, _Settings(threads, _library_file(folder, manifest, library), tuple(providers))
    )


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
            hint=DAMAGED if library is not None else f"{DAMAGED}; {_WITHOUT_LIBRARY}",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class OnnxModel(OpenedModel):
    """An artefact opened with ONNX Runtime."""

    def __init__(self, folder: Path, manifest: dict[str, Any], settings: _Settings) -> None:
        super().__init__(folder, manifest, settings.threads)
        self._settings = settings
        self.session = self._open(settings.threads)

    @property
    def library(self) -> Path | None:
        """The op library in use, None for stock ONNX Runtime."""
        return self._settings.library

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

    def _runner(self, threads: int | None) -> Callable[[dict[str, np.ndarray]], Any]:
        session = self.session if threads == self.threads else self._open(threads)
        return lambda feed: session.run(None, feed)
