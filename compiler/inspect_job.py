"""`isofold inspect`: a model's layers or channel spaces, or an artefact's contents and integrity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .artefact import MANIFEST, read_manifest
from .errors import InputError
from .html_report import write_html
from .opened import damage

Say = Callable[[str], None]


def inspect(
    subject: str,
    *,
    recipe: str,
    calibration: Path | None,
    html: Path | None,
    say: Say,
    spaces: bool = False,
) -> dict[str, Any]:
    """Facts about a model or an artefact, as JSON-like values; `kind` says which. Raises IsofoldError."""
    if (Path(subject) / MANIFEST).is_file():
        if spaces:
            raise InputError(
                "Channel spaces are those of a model, and this is a compiled artefact",
                where=subject,
                hint="give the model that it was made of; report.html in the folder shows them if its recipe folds",
            )
        return inspect_artefact(Path(subject), html, say)
    if html is not None:
        raise InputError(
            "A page can only be written for an artefact",
            where=subject,
            hint="compile the model first: isofold compile MODEL",
        )
    if spaces:
        return inspect_spaces(subject, say)
    return inspect_model(subject, recipe, calibration, say)


def inspect_artefact(folder: Path, html: Path | None, say: Say) -> dict[str, Any]:
    """Manifest, layers, operators and the files that are missing or changed (`damaged`). Needs no torch."""
    from .loading import load

    manifest = read_manifest(folder)
    say("verify hashes")
    damaged = damage(folder, manifest, hashes=True)
    facts: dict[str, Any] = {
        "kind": "artefact",
        "folder": str(folder),
        **{
            key: manifest.get(key)
            for key in ("isofold", "backend", "format_version", "inputs", "outputs", "caches", "files")
        },
        "damaged": damaged,
    }
    if damaged:
        return facts
    say("open")
    report = load(folder).report
    facts.update(
        {
            key: report.get(key)
            for key in ("recipe", "target", "environment", "totals", "layers", "refused", "profile")
        }
    )
    if html is not None:
        facts["html"] = str(write_html(report, html))
    return facts


def inspect_model(text: str, recipe: str, calibration: Path | None, say: Say) -> dict[str, Any]:
    """The captured program and, for each weight, what the recipe makes of it or why it stays float.

    The passes really run (without verification), so the answer is that of `compile`.
    """
    from .compile_job import read_calibration
    from .frontend import prepare, report_of
    from .model_reference import resolve_model

    batches = read_calibration(calibration)
    say("load the model")
    reference = resolve_model(text)
    lowerable = prepare(
        reference.model,
        reference.args,
        reference.kwargs,
        recipe=recipe,
        calibration=batches,
        dynamic_shapes=reference.dynamic_shapes,
        verify=False,
        progress=say,
    )
    report = report_of(lowerable, "cpu")
    operators = Counter(
        str(node.target) for node in lowerable.captured.graph.nodes if node.op == "call_function"
    )
    return {
        "kind": "model",
        "model": report["model"],
        "recipe": report["recipe"],
        "weights": _weights(lowerable.captured, report),
        "operators": dict(operators.most_common()),
        "totals": report["totals"],
        "caches": report["caches"],
        "refused": report["refused"],
        "passes": report["passes"],
    }


def inspect_spaces(text: str, say: Say) -> dict[str, Any]:
    """The channel spaces of the canonical program, as `spaces.describe` gives them. No recipe changes them."""
    from .canonicalize import canonicalize
    from .driver import Step, run_steps
    from .frontend import capture_model
    from .model_reference import resolve_model
    from .spaces.analysis import analyse
    from .spaces.describe import describe

    say("load the model")
    reference = resolve_model(text)
    say("capture")
    captured = capture_model(reference.model, reference.args, reference.kwargs, reference.dynamic_shapes)
    program, _ = run_steps(captured, [Step(canonicalize)], verify=False, progress=say)
    say("find channel spaces")
    return {"kind": "spaces", "model": reference.name, **describe(analyse(program))}


def _weights(captured: Any, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each weight with two dimensions or more; smaller tensors (gains, biases) are one row together."""
    from torch import Tensor

    from .graph import module_path
    from .report import MAKERS_OF_CODES

    quantized: dict[str, Mapping[str, Any]] = {}
    for row in report["layers"]:
        quantized.setdefault(str(row["weight"]), row)
    reasons = {
        place["module"]: group["reason"]
        for group in report["refused"]
        if group["pass"].startswith(MAKERS_OF_CODES)
        for place in group["places"]
    }
    rows: list[dict[str, Any]] = []
    vectors = 0
    for node in captured.graph.nodes:
        held = captured.tensors.get(str(node.target)) if node.op == "get_attr" else None
        if not isinstance(held, Tensor) or not held.is_floating_point():
            continue
        size = held.numel() * held.element_size()
        if held.dim() < 2:
            vectors += size
            continue
        readers = sorted(
            {str(user.target).removesuffix(".default") for user in node.users if user.op == "call_function"}
        )
        module = module_path(next(iter(node.users)))
        row = quantized.get(str(node.target))
        rows.append(
            {
                "name": str(node.target),
                "module": module,
                "read_by": readers,
                "shape": list(held.shape),
                "dtype": str(held.dtype).removeprefix("torch."),
                "bytes": size,
                "bytes_after": row["bytes_after"] if row else size,
                "becomes": becomes(row)
                if row
                else f"stays float: {reasons.get(module, 'not chosen by the recipe')}",
            }
        )
    if vectors:
        rows.append(
            {"name": "(vectors: gains, biases)", "shape": [], "bytes": vectors, "becomes": "stay as they are"}
        )
    return rows


def becomes(row: Mapping[str, Any]) -> str:
    """The format of a layer in words, such as `int4, groups of 32, error 0.07`."""
    groups = f"groups of {row['group_size']}" if row["group_size"] else "one scale a row"
    error = f", error {row['error']:.3g}" if row["error"] is not None else ""
    if row["format"] != "int":
        return f"{row['format']}, {groups}{error}"
    return f"int{row['bits']}, {groups}{'' if row['symmetric'] else ', asymmetric'}{error}"
