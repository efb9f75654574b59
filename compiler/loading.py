"""Opening artefacts. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artefact import read_manifest
from .registry import backend_named

if TYPE_CHECKING:
    from .opened import OpenedModel


def load(
    folder: str | os.PathLike[str], *, threads: int | None = None, verify: bool = False, **options: Any
) -> OpenedModel:
    """Open an artefact that `isofold.compile` wrote: a callable with the module's signature.

    threads: of one call; None leaves the choice to the runtime.
    verify: compare the hashes of all files too, not only their sizes.
    options: of the runtime (for ONNX Runtime: `library=False` runs without the op library, `providers`).

    Raises ArtefactError where the folder is missing, damaged, incomplete or of a newer format, and InputError for
    options that the runtime does not know.
    """
    backend = backend_named(str(read_manifest(folder).get("backend", "onnx")))
    return backend.open(Path(folder), threads=threads, verify=verify, **options)
