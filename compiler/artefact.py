"""Artefact folders: what every backend's output has in common. Imports no torch.

An artefact is one folder with a manifest `isofold.json` (format version, backend, files with sizes and
hashes). It is written under a temporary name beside its place and renamed when complete, so that an
interrupted or failed compilation leaves nothing half-written.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ArtefactError
from .whole_pages import WholePagesWriter

MANIFEST = "isofold.json"
FORMAT_VERSION = 1


@contextmanager
def publishing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    An existing artefact is replaced only with `overwrite`; anything else that exists is never touched.
    Raises ArtefactError.
    """
    folder = folder.absolute()
    if folder.exists() and not (overwrite and _replaceable(folder)):
        raise ArtefactError(
            "The output folder exists already",
            where=str(folder),
            hint="choose another folder"
            + (
                ", or allow overwriting"
                if _replaceable(folder)
                else "; it holds something that is not an isofold artefact"
            ),
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield beside
        os.chmod(beside, 0o755)
        _swap(beside, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    os.rename(folder, old / "artefact")
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / "artefact", folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises ArtefactError where it cannot be written.
    """
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with WholePagesWriter(io.FileIO(handle, "wb")) as file:
                yield file
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            Path(beside).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> ArtefactError:
    """The ArtefactError for a failed write: a full disk and missing permission are told apart."""
    reasons = {
        errno.ENOSPC: ("there is no space left", "free some space or choose another folder"),
        errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
        errno.EACCES: ("permission denied", "choose a folder you may write to"),
        errno.EPERM: ("permission denied", "choose a folder you may write to"),
        errno.EROFS: ("the file system is read-only", "choose a folder you may write to"),
    }
    got, hint = reasons.get(error.errno or 0, (str(error), "choose another folder"))
    return ArtefactError("The output cannot be written", where=str(path), got=got, hint=hint)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an artefact. Raises ArtefactError where it is missing, damaged or of a newer format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ArtefactError(
            "This is not an isofold artefact",
            where=str(folder),
            expected=f"a folder with {MANIFEST}",
            got="no such folder" if not Path(folder).is_dir() else f"a folder without {MANIFEST}",
        )
    try:
        manifest = json.loads(path.read_text())
        version = int(manifest["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            "The artefact's manifest is damaged",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            hint="compile it again",
        ) from error
    if version > FORMAT_VERSION:
        raise ArtefactError(
            "The artefact was written by a newer isofold",
            where=str(folder),
            expected=f"format version up to {FORMAT_VERSION}",
            got=f"format version {version} (isofold {manifest.get('isofold', 'unknown')})",
            hint="upgrade isofold: pip install -U isofold",
        )
    return dict(manifest)
