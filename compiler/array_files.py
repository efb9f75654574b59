"""Files of named arrays: inputs for `isofold run` and `bench`, and calibration data.

`.npz` and `.safetensors` hold arrays named after the model's inputs. For several batches a number follows the name:
`input_ids.0`, `input_ids.1`, ... A `.pt` file holds a list of batches as `isofold.compile(calibration=...)` takes them
(tuples, dicts or tensors), or one dict. Only `.pt` files need torch.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artefact import replacing
from .errors import InputError

Arrays = dict[str, NDArray[Any]]
_NUMBERED = re.compile(r"^(.+)\.(\d+)$")


def read_arrays(path: str | os.PathLike[str]) -> Arrays:
    """The arrays of a `.npz` or `.safetensors` file. Raises InputError that names the file."""
    path = _existing(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
        with np.load(path, allow_pickle=False) as held:
            if isinstance(held, np.ndarray):
                raise InputError(
                    "The file holds one array without a name",
                    where=str(path),
                    expected="numpy.savez(file, name=array)",
                )
            return {name: held[name] for name in held.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise _unreadable(path, error) from error
        raise


def read_batches(path: str | os.PathLike[str]) -> list[Any]:
    """Calibration batches from a `.npz`, `.safetensors` or `.pt` file, as torch tensors. Raises InputError."""
    import torch

    path = _existing(path)
    if path.suffix in (".pt", ".pth"):
        try:
            held = torch.load(path, weights_only=True)
        except Exception as error:
            raise _unreadable(path, error) from error
        batches = list(held) if isinstance(held, (list, tuple)) else [held]
    else:
        batches = [
            {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}
            for batch in numbered_batches(read_arrays(path))
        ]
    if not batches:
        raise InputError("The file holds no calibration data", where=str(path))
    return batches


def numbered_batches(arrays: Mapping[str, NDArray[Any]]) -> list[Arrays]:
    """`{a.0, b.0, a.1, b.1}` → `[{a, b}, {a, b}]` in order of the numbers; names without a number are one batch."""
    batches: dict[int, Arrays] = {}
    for name, array in arrays.items():
        found = _NUMBERED.match(name)
        plain, number = (found[1], int(found[2])) if found else (name, -1)
        batches.setdefault(number, {})[plain] = array
    return [batches[number] for number in sorted(batches)]


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a `.npz` file, complete or not at all. Raises ArtefactError."""
    path = Path(path)
    with replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes the names for its own keyword


def _existing(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if not found.is_file():
        raise InputError(
            "There is no such data file",
            where=str(path),
            expected=".npz, .safetensors or (calibration only) .pt",
        )
    return found


def _unreadable(path: Path, error: Exception) -> InputError:
    first = str(error).strip().splitlines()
    return InputError(
        "The data file cannot be read",
        where=str(path),
        expected=".npz, .safetensors, or for calibration .pt without pickled objects",
        got=f"{type(error).__name__}: {first[0] if first else ''}",
    )
