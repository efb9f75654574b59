"""The report as one HTML file that needs nothing else: no network, no fonts, no libraries. Imports no torch.

Charts are inline SVG (`svg`); the one script on the page sorts and filters the table of layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .artefact import replacing
from .svg import graph_svg, histogram_svg

_OWN_KEYS = frozenset(
    {
        *("isofold", "model", "recipe", "target", "environment", "seconds", "total_seconds", "totals"),
        *("passes", "layers", "refused", "blocks", "histograms", "profile"),
        *("spaces", "folds", "hadamards", "sparsity", "caches"),
    }
)
"""What the page shows in its own sections; other keys are facts of backends."""
_SHOWN_NODES = 60
"""Blocks in the picture; a graph with more is listed in the table only."""


def render_html(report: Mapping[str, Any]) -> str:
    """The HTML page of a report (`report.build_report`, with `add_profile` or without)."""
    environment = Environment(
        loader=PackageLoader("isofold.compiler", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes,
        number=_number,
        microseconds=format_microseconds,
        path=_path,
        place=place_text,
        summary=summary_line,
    )
    layers = report["layers"]
    return environment.get_template("report.html.jinja").render(
        report=report,
        totals=report["totals"],
        layers=layers,
        timed=any(row["microseconds"] is not None for row in layers),
        recipe_yaml=yaml.safe_dump(
            dict(report["recipe"]), sort_keys=False, default_flow_style=None, width=100
        ),
        block_svg=_block_svg(report["blocks"]),
        detail_svg=_detail_svg(report["blocks"]["detail"]),
        histograms=[
            {**entry, "svg": histogram_svg(entry["low"], entry["high"], entry["before"], entry["after"])}
            for entry in report["histograms"]
        ],
        profile=report.get("profile"),
        model=report.get("cost_model"),
        spaces=report.get("spaces"),
        folds=report.get("folds", []),
        hadamards=report.get("hadamards", []),
        sparsity=report.get("sparsity", []),
        caches=report.get("caches", []),
        backend=_flat({key: held for key, held in report.items() if key not in _OWN_KEYS}),
        error=program_error(report),
    )


def write_html(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the page to `path`, complete or not at all. Raises ArtefactError."""
    path = Path(path)
    text = render_html(report)
    with replacing(path) as file:
        file.write(text.encode())
    return path


def program_error(report: Mapping[str, Any]) -> float | None:
    """The largest measured error of a lossy pass on the whole program's output; None where nothing was measured."""
    errors = [p["error"] for p in report["passes"] if p["guarantee"] == "lossy" and p["error"] is not None]
    return max(errors, default=None)


def format_bytes(size: float | None) -> str:
    """Bytes as people write them: 1.5 MB (powers of 1000)."""
    if size is None:
        return "-"
    if abs(size) < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if abs(size) < 999.5:
            return f"{size:.3g} {unit}"
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}"
    raise AssertionError("unreachable")


def format_microseconds(spent: float | None) -> str:
    """Microseconds, or milliseconds from a thousand on."""
    if spent is None:
        return "-"
    return f"{spent / 1000:.2f} ms" if spent >= 1000 else f"{spent:.0f} µs"


def place_text(place: Mapping[str, Any]) -> str:
    """Where something is: module path, and file and line without folders and code, as far as known."""
    source = place.get("source")
    line = ":".join(source.split(": ")[0].rpartition("/")[2].split(":")[:2]) if source else place["node"]
    return ", ".join(part for part in (place["module"], line) if part) or "(model)"


def summary_line(summary: Mapping[str, int]) -> str:
    """The summary of `spaces.describe` in one sentence."""
    return (
        f"{summary['spaces']} channel spaces; {summary['foldable']} of {summary['gains']} gains fold; "
        f"{summary['free_scales']} free scales, {summary['free_shifts']} free shifts"
    )


def _path(module: str) -> Markup:
    """A module path that may break after its dots."""
    return Markup(str(escape(module or "(model)")).replace(".", ".<wbr>"))


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2e}" if x and (abs(x) < 1e-2 or abs(x) >= 1e5) else f"{x:.3g}"


def _block_svg(blocks: Mapping[str, Any]) -> str:
    # Blocks that only check something (asserts) feed nothing and would be dead ends.
    feeding = {source for source, _ in blocks["edges"]}
    nodes = [node for node in blocks["nodes"] if node["id"] in feeding or node["kind"] == "output"]
    shown = {node["id"] for node in nodes}
    if not 0 < len(nodes) <= _SHOWN_NODES:
        return ""
    drawn = []
    for node in nodes:
        inner = node["kind"] == "block"
        operators = f"{node['operators_before']} → {node['operators_after']} operators"
        held = f", {format_bytes(node['bytes_after'])}" if node["bytes_after"] else ""
        times = f"{node['count']} x " if node["count"] > 1 else ""
        drawn.append(
            {
                "id": node["id"],
                "title": f"{times}{node['label']}",
                "subtitle": operators + held if inner else "",
                "kind": node["kind"],
            }
        )
    return graph_svg(drawn, [edge for edge in blocks["edges"] if shown.issuperset(edge)])


def _detail_svg(detail: Mapping[str, Any] | None) -> str:
    if detail is None:
        return ""
    drawn = [
        {"id": node["id"], "title": node["label"], "subtitle": node["where"], "kind": node["kind"]}
        for node in detail["nodes"]
    ]
    return graph_svg(drawn, detail["edges"])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Nested facts as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, held in facts.items():
        if isinstance(held, Mapping):
            pairs += _flat(held, f"{prefix}{key}.")
        elif isinstance(held, (list, tuple)):
            pairs.append((f"{prefix}{key}", ", ".join(map(str, held)) or "none"))
        else:
            pairs.append((f"{prefix}{key}", str(held)))
    return pairs
