"""`isofold inspect`: a model's layers or channel spaces, or an artefact's contents and integrity."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .artefact import MANIFEST, read_manifest
from .console import show as show_line
from .console import show_table
from .errors import InputError
from .html_report import format_bytes, format_microseconds, place_text, summary_line, write_html

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
    damaged = _damaged(folder, manifest)
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


def show(facts: Mapping[str, Any]) -> None:
    """Facts of any kind as tables on stdout."""
    if facts["kind"] == "artefact":
        _show_artefact(facts)
    elif facts["kind"] == "spaces":
        _show_spaces(facts)
    else:
        _show_model(facts)


def _damaged(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        else:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    problems.append(f"{name} has another content than was written")
    return problems


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
                "becomes": _becomes(row)
                if row
                else f"stays float: {reasons.get(module, 'not chosen by the recipe')}",
            }
        )
    if vectors:
        rows.append(
            {"name": "(vectors: gains, biases)", "shape": [], "bytes": vectors, "becomes": "stay as they are"}
        )
    return rows


def _becomes(row: Mapping[str, Any]) -> str:
    groups = f"groups of {row['group_size']}" if row["group_size"] else "one scale a row"
    error = f", error {row['error']:.3g}" if row["error"] is not None else ""
    if row["format"] != "int":
        return f"{row['format']}, {groups}{error}"
    return f"int{row['bits']}, {groups}{'' if row['symmetric'] else ', asymmetric'}{error}"


def _show_model(facts: Mapping[str, Any]) -> None:
    model, totals = facts["model"], facts["totals"]
    show_line(
        f"{model['name']}: {totals['parameters']:,} parameters, {format_bytes(totals['weight_bytes_before'])}"
    )
    for label in ("inputs", "outputs"):
        show_line(f"{label}: " + ", ".join(_port(port) for port in model[label]))
    rows = [
        [
            row["name"],
            " x ".join(map(str, row["shape"])),
            format_bytes(row["bytes"]),
            ", ".join(row.get("read_by", [])),
            row["becomes"],
        ]
        for row in facts["weights"]
    ]
    show_table(["weight", "shape", ">bytes", "read by", f"with {facts['recipe']['name']}"], rows)
    _show_caches(facts["caches"])
    listed = ", ".join(f"{count} {name}" for name, count in list(facts["operators"].items())[:12])
    show_line(f"operators: {totals['operators_before']} → {totals['operators_after']} ({listed})")
    show_line(
        f"weights: {format_bytes(totals['weight_bytes_before'])} → {format_bytes(totals['weight_bytes_after'])}, "
        f"{100 * totals['quantized_share']:.1f} % quantized"
    )


_LISTED = 3
"""Parameters of a space, and places of a reason, that tables name."""


def _show_spaces(facts: Mapping[str, Any]) -> None:
    gains = {gain["name"]: gain for gain in facts["gains"]}
    rows = [
        [
            space["name"],
            f"{space['channels']}{' x ' + str(space['copies']) if space['copies'] > 1 else ''}",
            space["group"],
            str(len(space["parameters"])),
            _parameters(space["parameters"]),
            _folding([gains[name] for name in space["gains"]]),
            _bound(space["bound"]),
        ]
        for space in facts["spaces"]
    ]
    show_line(f"{facts['model']}: {summary_line(facts['summary'])}")
    show_table(
        ["space", ">channels", "group", ">parameters", "such as (axis)", "gains", "bound set by"], rows
    )
    kept: dict[str, list[str]] = {}
    for gain in facts["gains"]:
        if not gain["folds"]:
            kept.setdefault(gain["kept"]["why"], []).append(f"{gain['name']} ({place_text(gain['kept'])})")
    if kept:
        rows = [[str(len(names)), _first(names), reason] for reason, names in kept.items()]
        show_table([">gains", "that stay (decided at)", "because"], rows)


def _parameters(members: list[dict[str, Any]]) -> str:
    return _first([f"{member['name']} ({member['axis']})" for member in members])


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _folding(gains: list[dict[str, Any]]) -> str:
    if not gains:
        return "none"
    folding = sum(gain["folds"] for gain in gains)
    return "all fold" if folding == len(gains) else f"{folding} of {len(gains)} fold"


def _bound(bound: Mapping[str, Any] | None) -> str:
    if bound is None:
        return "nothing"
    return f"{bound['why']} ({place_text(bound)})"


def _show_artefact(facts: Mapping[str, Any]) -> None:
    show_line(
        f"{facts['folder']}: {facts['backend']} artefact, format {facts['format_version']}, isofold {facts['isofold']}"
    )
    for label in ("inputs", "outputs"):
        show_line(f"{label}: " + ", ".join(_port(port) for port in facts[label]))
    _show_caches(facts["caches"] or [])
    rows = [
        [name, format_bytes(entry["bytes"]), entry["sha256"][:16]] for name, entry in facts["files"].items()
    ]
    show_table(["file", ">bytes", "sha256"], rows)
    if facts["damaged"]:
        show_line("damaged: " + "; ".join(facts["damaged"]))
        show_line("compile the model again, or copy the whole folder again")
        return
    show_line("all files are as they were written")
    layers = [
        [
            row["module"] or "(model)",
            " x ".join(map(str, row["shape"])),
            _becomes(row),
            format_bytes(row["bytes_before"]),
            format_bytes(row["bytes_after"]),
            format_microseconds(row["microseconds"]),
            format_microseconds(row.get("predicted_microseconds")),
        ]
        for row in facts["layers"]
    ]
    show_table(["layer", "shape", "format", ">before", ">after", ">time", ">predicted"], layers)
    totals = facts["totals"]
    show_line(
        f"recipe {facts['recipe']['name']}: {format_bytes(totals['weight_bytes_before'])} → "
        f"{format_bytes(totals['weight_bytes_after'])}, "
        f"{totals['operators_before']} → {totals['operators_after']} operators"
    )
    if facts["profile"]:
        slowest = facts["profile"]["by_type"][:8]
        rows = [
            [entry["op"], str(entry["nodes"]), format_microseconds(entry["microseconds"])]
            for entry in slowest
        ]
        show_table(["operator", ">nodes", ">time"], rows)
    if "html" in facts:
        show_line(f"report    {facts['html']}")


def _show_caches(caches: Sequence[Mapping[str, Any]]) -> None:
    """What goes in and out as codes, if something does."""
    if not caches:
        return
    rows = [
        [
            row["kind"],
            row["was"],
            ", ".join(row["inputs"]),
            ", ".join(row["outputs"]),
            f"{row['heads']} x {row['head_size']}",
            str(row["bits"]),
            format_bytes(row["float_bytes"]),
            format_bytes(row["token_bytes"]),
        ]
        for row in caches
    ]
    show_table(["cache", "was", "inputs", "outputs", ">heads", ">bits", ">floats a token", ">codes"], rows)


def _port(port: Mapping[str, Any]) -> str:
    return f"{port['name']} {port['dtype']}[{', '.join(map(str, port['shape'] or []))}]"
