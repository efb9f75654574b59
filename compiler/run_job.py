"""`isofold run` and `isofold bench`: artefacts on files of inputs. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .array_files import Arrays, read_arrays, write_arrays
from .artefact import read_manifest
from .console import show, show_table
from .errors import ArtefactError, InputError, near_misses
from .html_report import format_bytes
from .loading import load
from .timing import interleaved

Say = Callable[[str], None]


def run_artefact(
    folder: Path, inputs: Path | None, outputs: Path | None, *, threads: int | None, overwrite: bool, say: Say
) -> dict[str, Any]:
    """Run an artefact once; write results to `outputs` where given. Returns shapes, statistics and milliseconds."""
    if outputs is not None and outputs.exists() and not overwrite:
        raise ArtefactError(
            "The output file exists already", where=str(outputs), hint="choose another name, or add --force"
        )
    say("open")
    model = load(folder, threads=threads)
    arrays = inputs_for(model, inputs)
    say("run")
    started = time.perf_counter()
    results: Arrays = model.run(arrays)
    spent = 1000 * (time.perf_counter() - started)
    if outputs is not None:
        write_arrays(outputs, results)
    return {
        "artefact": str(folder),
        "inputs": {name: _described(array) for name, array in arrays.items()},
        "outputs": {name: {**_described(array), **_statistics(array)} for name, array in results.items()},
        "milliseconds": spent,
        "written": str(outputs) if outputs else None,
    }


def show_summary(summary: Mapping[str, Any]) -> None:
    """The results of `run_artefact` as tables on stdout."""
    rows = []
    for name, facts in summary["outputs"].items():
        numbers = [
            f"{facts[key]:.4g}" if facts.get(key) is not None else "-" for key in ("mean", "least", "largest")
        ]
        rows.append(
            [name, facts["dtype"], " x ".join(map(str, facts["shape"])), *numbers, str(facts["not_finite"])]
        )
    show_table(["output", "dtype", "shape", ">mean", ">least", ">largest", ">not finite"], rows)
    show(
        f"{summary['milliseconds']:.1f} ms"
        + (f", written to {summary['written']}" if summary["written"] else "")
    )


def bench(
    paths: Sequence[Path], inputs: Path | None, *, seconds: float, threads: int | None, say: Say
) -> list[dict[str, Any]]:
    """Latencies of artefacts and `.onnx` files in one interleaved run on the same inputs.

    Returns `{name, bytes, median, first_quartile, third_quartile, least, runs, ratio}`, times in milliseconds; ratio is
    the first subject's median over this one's (above 1: faster than the first).
    """
    say("open")
    first = load(paths[0], threads=threads)
    arrays = inputs_for(first, inputs)
    subjects: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for position, path in enumerate(paths):
        name = str(path) if str(path) not in subjects else f"{path} ({position + 1})"
        subjects[name] = _runner(first if position == 0 else None, path, arrays, threads)
        sizes[name] = _bytes_of(path)
    times = interleaved(subjects, seconds=seconds, say=say)
    base = times[next(iter(times))].median
    return [
        {"name": name, "bytes": sizes[name], **latency.to_json(), "ratio": base / latency.median}
        for name, latency in times.items()
    ]


def show_latencies(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of `bench` as a table on stdout."""
    columns = ["", ">size", ">median", ">quartiles", ">least", ">runs"] + (
        [">speed"] if len(rows) > 1 else []
    )
    table = []
    for row in rows:
        quartiles = f"{row['first_quartile']:.3f} to {row['third_quartile']:.3f}"
        cells = [
            row["name"],
            format_bytes(row["bytes"]),
            f"{row['median']:.3f} ms",
            quartiles,
            f"{row['least']:.3f}",
        ]
        table.append([*cells, str(row["runs"]), *([f"{row['ratio']:.2f}"] if len(rows) > 1 else [])])
    show_table(columns, table)


def inputs_for(model: Any, path: Path | None) -> Arrays:
    """Inputs by name from a file, else the artefact's example inputs. Raises InputError for names that differ."""
    if path is None:
        return dict(model.examples())
    arrays = read_arrays(path)
    wanted = [port.name for port in model.inputs]
    missing, unknown = [n for n in wanted if n not in arrays], [n for n in arrays if n not in wanted]
    if missing or unknown:
        hints = [hint for name in unknown if (hint := near_misses(name, missing))]
        raise InputError(
            "The file's arrays are not the model's inputs",
            where=str(path),
            expected=", ".join(f"{p.name} {p.dtype}[{', '.join(map(str, p.shape))}]" for p in model.inputs),
            got=", ".join(arrays) or "no arrays",
            hint="; ".join(hints) or None,
        )
    return {name: arrays[name] for name in wanted}


def _runner(opened: Any, path: Path, arrays: Arrays, threads: int | None) -> Callable[[], object]:
    if path.suffix == ".onnx":
        return _onnx_runner(path, arrays, threads)
    model = opened or load(path, threads=threads)
    wanted = {port.name for port in model.inputs}
    if wanted != set(arrays):
        raise InputError(
            "The artefacts do not take the same inputs",
            where=str(path),
            expected=", ".join(arrays),
            got=", ".join(sorted(wanted)),
        )
    return lambda: model.run(arrays)


def _onnx_runner(path: Path, arrays: Arrays, threads: int | None) -> Callable[[], object]:
    import onnxruntime

    if not path.is_file():
        raise InputError(
            "There is no such file", where=str(path), expected="an artefact's folder or an .onnx file"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(
            "ONNX Runtime cannot open the file", where=str(path), got=str(error).strip().splitlines()[0]
        ) from error
    names = [port.name for port in session.get_inputs()]
    if set(names) != set(arrays):
        if len(names) != len(arrays):
            raise InputError(
                "The file takes other inputs",
                where=str(path),
                expected=", ".join(arrays),
                got=", ".join(names),
            )
        print(f"{path}: inputs are matched by position: {', '.join(names)}", file=sys.stderr)
        arrays = dict(zip(names, arrays.values(), strict=True))
    return lambda: session.run(None, arrays)


def model_bytes(folder: Path) -> int:
    """Bytes of an artefact's model and weights: all files of its manifest but the op library, which models share."""
    files = read_manifest(folder)["files"]
    return sum(int(entry["bytes"]) for name, entry in files.items() if not name.endswith(".so"))


def _bytes_of(path: Path) -> int:
    if path.is_dir():
        return model_bytes(path)
    return sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*") if f.suffix in (".onnx", ".data"))


def _described(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape)}


def _statistics(array: NDArray[Any]) -> dict[str, Any]:
    numbers = array.astype(np.float64) if array.dtype.kind in "fiub" else np.zeros(0)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        return {"mean": None, "least": None, "largest": None, "not_finite": int(numbers.size)}
    return {
        "mean": float(finite.mean()),
        "least": float(finite.min()),
        "largest": float(finite.max()),
        "not_finite": int(numbers.size - finite.size),
    }
