"""Opening artefacts. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .artefact import read_manifest
from .registry import backend_named


def load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Open an artefact that `isofold.compile` wrote: a callable with the module's signature.

    options: of the backend (for ONNX: threads, library). Raises ArtefactError where the folder is missing,
    damaged, incomplete or of a newer format.
    """
    manifest = read_manifest(folder)
    return backend_named(str(manifest.get("backend", "onnx"))).open(Path(folder), **options)
