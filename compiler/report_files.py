"""The report in an artefact's folder: `report.json`, and `report.html` with the times of every operator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artefact import replacing
from .html_report import write_html
from .report import add_profile

REPORT_PAGE, REPORT_FILE = "report.html", "report.json"


def add_measurements(model: Any, folder: Path, seconds: Mapping[str, float] | None = None) -> Path:
    """Profile an opened artefact, put the times into its report, and write the page beside it. Returns the page.

    Without the device that the artefact is for there are no times. seconds: of the stages of the compilation, where
    they are known only after the report was written.
    """
    report = dict(model.report)
    if seconds is not None:
        report["seconds"] = dict(seconds)
    if hasattr(model, "profile") and getattr(model, "runs_here", True):
        add_profile(report, model.profile())
    with replacing(folder / REPORT_FILE) as file:
        file.write(json.dumps(report, indent=1).encode())
    return write_html(report, folder / REPORT_PAGE)
