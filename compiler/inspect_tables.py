"""`isofold inspect` on the terminal: the facts of `inspect_job` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .console import show as show_line
from .console import show_table
from .html_report import format_bytes, format_microseconds, place_text, summary_line
from .inspect_job import becomes


def show_facts(facts: Mapping[str, Any]) -> None:
    """Facts of any kind as tables on stdout."""
    if facts["kind"] == "artefact":
        _show_artefact(facts)
    elif facts["kind"] == "spaces":
        _show_spaces(facts)
    else:
        _show_model(facts)


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
            becomes(row),
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
