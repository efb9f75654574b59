"""The report in an artefact's folder: `report.json`, and `report.html` with the times of every operator."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artefact import cannot_write
from .html_report import write_html
from .report import add_profile

REPORT_PAGE, REPORT_FILE = "report.html", "report.json"


def add_measurements(model: Any, folder: Path, seconds: Mapping[str, float] | None = None) -> Path:
    """Profile an opened artefact, put the times into its report, and write the page beside it. Returns the page.

    seconds: of the stages of the compilation, where they are known only after the report was written.
    """
    report = dict(model.report)
    if seconds is not None:
        report["seconds"] = dict(seconds)
    if hasattr(model, "profile"):
        add_profile(report, model.profile())
    _replace(folder / REPORT_FILE, json.dumps(report, indent=1))
    return write_html(report, folder / REPORT_PAGE)


def _replace(path: Path, text: str) -> None:
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            Path(beside).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
