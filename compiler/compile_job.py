"""`isofold compile` and `isofold export`: from the arguments of the command line to files and a summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .console import show, show_table
from .errors import ArtefactError
from .frontend import compile as compile_
from .frontend import export
from .html_report import format_bytes, format_microseconds, program_error
from .loading import load
from .model_reference import resolve_model
from .recipe import resolve
from .report_files import add_measurements

_LISTED = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Compiled:
    """What `isofold compile` made."""

    folder: Path
    page: Path
    report: dict[str, Any]

    def show(self) -> None:
        """A summary on stdout."""
        show_totals(self.report, str(self.folder))
        show(f"report    {self.page}")


def compile_model(
    text: str,
    *,
    recipe: str,
    target: str,
    output: Path | None,
    calibration: Path | None,
    threads: int | None,
    verify: bool,
    overwrite: bool,
    say: Say,
) -> Compiled:
    """Compile the model that `text` names, measure every operator, and write the report into the artefact."""
    started = time.perf_counter()
    chosen = resolve(recipe)
    batches = read_calibration(calibration)
    _use_threads(threads)
    say("load the model")
    reference = resolve_model(text)
    folder = output or Path(f"{reference.name}-{chosen.name}")
    compile_(
        reference.model,
        reference.args,
        reference.kwargs,
        target=target,
        recipe=chosen,
        calibration=batches,
        dynamic_shapes=reference.dynamic_shapes,
        output=folder,
        overwrite=overwrite,
        verify=verify,
        progress=say,
        measure=False,  # below, with the asked number of threads
    )
    say("measure every operator")
    opened = load(folder, threads=threads)
    page = add_measurements(opened, folder)
    report = dict(opened.report)
    report["total_seconds"] = time.perf_counter() - started
    return Compiled(folder, page, report)


def export_model(
    text: str,
    path: Path,
    *,
    recipe: str,
    target: str,
    calibration: Path | None,
    threads: int | None,
    verify: bool,
    overwrite: bool,
    say: Say,
) -> dict[str, Any]:
    """Compile the model that `text` names into one file. Returns the report."""
    if path.exists() and not overwrite:
        raise ArtefactError(
            "The output file exists already", where=str(path), hint="choose another name, or add --force"
        )
    chosen = resolve(recipe)
    batches = read_calibration(calibration)
    _use_threads(threads)
    say("load the model")
    reference = resolve_model(text)
    return export(
        reference.model,
        path,
        reference.args,
        reference.kwargs,
        target=target,
        recipe=chosen,
        calibration=batches,
        dynamic_shapes=reference.dynamic_shapes,
        verify=verify,
        progress=say,
    )


def show_totals(report: Mapping[str, Any], written: str) -> None:
    """What was written and how it compares with the captured model, on stdout."""
    totals = report["totals"]
    before, after = totals["weight_bytes_before"], totals["weight_bytes_after"]
    show(f"written   {written}")
    show(
        f"weights   {format_bytes(before)} → {format_bytes(after)} "
        f"({before / after if after else 1:.2f} times smaller); "
        f"{100 * totals['quantized_share']:.1f} % quantized in {len(report['layers'])} layers"
    )
    show(f"operators {totals['operators_before']} → {totals['operators_after']}")
    if report.get("folds"):
        show(f"folds     {_folded(report)}")
    if report.get("sparsity"):
        show(f"sparsity  {_sparse(report['sparsity'])}")
    if report.get("caches"):
        show(f"caches    {cache_line(report['caches'])}")
    error = program_error(report)
    if error is not None:
        show(f"error     {error:.3g} of the largest output, worst of the lossy passes, on the example inputs")
    if "profile" in report:
        show(
            f"operators take {format_microseconds(report['profile']['total_microseconds'])} on the example inputs"
        )
    if report.get("cost_model"):
        show(f"predicted {_predicted(report['cost_model'])}")
    if "total_seconds" in report:
        show(f"took      {report['total_seconds']:.1f} s")
    groups = report["refused"]
    if groups:
        rows = [[str(len(g["places"])), g["pass"], g["reason"]] for g in groups[:_LISTED]]
        show("")
        show_table([">places", "pass", "left alone, because"], rows)
        if len(groups) > _LISTED:
            show(f"and {len(groups) - _LISTED} more reasons in the report")


def _predicted(model: Mapping[str, Any]) -> str:
    text = f"{format_microseconds(model['predicted_microseconds'])} in packed layers"
    if not model["measured_here"]:
        text += f", on {model['machine']}: `isofold machine` measures this one"
    if model.get("unmeasured"):
        text += f"; no rates for {', '.join(model['unmeasured'])}"
    if model["slower"]:
        worst = max(model["slower"], key=lambda row: row["microseconds"] / row["faster_microseconds"])
        count = len(model["slower"])
        layers = "1 layer is" if count == 1 else f"{count} layers are"
        text += (
            f"\nslow      {layers} predicted to be slower than dense weights, such as "
            f"{worst['module'] or '<root>'}: {worst['format']} {format_microseconds(worst['microseconds'])}, "
            f"{worst['faster']} {format_microseconds(worst['faster_microseconds'])}"
        )
    return text


def _sparse(rows: Sequence[Mapping[str, Any]]) -> str:
    patterns = ", ".join(sorted({row["pattern"] for row in rows}))
    dense, saved = (sum(row[name] for row in rows) for name in ("dense_bytes", "saved_bytes"))
    gains = [row["predicted_speedup"] for row in rows]
    return (
        f"{len(rows)} linears skip zeros ({patterns}): {format_bytes(saved)} of {format_bytes(dense)} saved, "
        f"predicted {min(gains):.2f} to {max(gains):.2f} times the dense speed"
    )


def cache_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """What became of caches, in a line."""
    bits = " and ".join(f"uint{width}" for width in sorted({row["bits"] for row in rows}))
    now, before = (sum(row[name] for row in rows) for name in ("token_bytes", "float_bytes"))
    return f"{len(rows)} go in and out as {bits}: {format_bytes(before)} → {format_bytes(now)} a token"


def _folded(report: Mapping[str, Any]) -> str:
    applied = sum(len(row["applied"]) for row in report["folds"])
    errors = [row["error"] for row in report["folds"] if row["error"] is not None]
    exact = f", each equal within {max(errors):.0e}" if errors else ""
    count = len(report["hadamards"])
    return f"{applied} applied{exact}; {count} transforms left to run time"


def read_calibration(path: Path | None) -> list[Any] | None:
    """Batches of a calibration file, None without one."""
    if path is None:
        return None
    from .array_files import read_batches

    return read_batches(path)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
