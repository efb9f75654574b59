"""Tensors in one safetensors file that is mapped and used in place: every tensor starts at a multiple of 64 bytes.

safetensors forbids holes between tensors, so what fills up to a boundary is a tensor of its own (`__fill_N`, bytes of
zero). Tensors of 64 KiB and more start at a page. Reading needs neither torch nor a copy: NumPy arrays over a private
mapping of the file (writing into one would change only this process's memory).
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import ArtefactError
from .whole_pages import ask_for_large_pages

_LINE, _PAGE, _PAGED_FROM = 64, 4096, 65536
_FILL = "__fill_"
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = {code: name for name, code in _CODES.items()}


def write_tensors(
    file: BinaryIO,
    tensors: Iterable[tuple[str, str, tuple[int, ...], memoryview | bytes]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write (name, dtype, shape, bytes) in order. Returns the size of the file."""
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    position = 0
    fills: list[int] = []
    for name, dtype, shape, data in entries:
        size = len(data)
        boundary = _PAGE if size >= _PAGED_FROM else _LINE
        fill = -position % boundary
        if fill:
            header[f"{_FILL}{len(fills)}"] = _entry("uint8", (fill,), position, fill)
        fills.append(fill)
        position += fill
        header[name] = _entry(dtype, shape, position, size)
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data starts at a page as well; the header may end in spaces.
    text += b" " * (-(8 + len(text)) % _PAGE)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for fill, (_, _, _, data) in zip(fills, entries, strict=True):
        file.write(bytes(fill))
        file.write(data)
    return 8 + len(text) + position


def _entry(dtype: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, Any]:
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays over a mapping of the file, by name. bfloat16 comes as uint16. Raises ArtefactError."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            ask_for_large_pages(mapped)
        found = {}
        for name, entry in header.items():
            if name == "__metadata__" or name.startswith(_FILL):
                continue
            start, end = entry["data_offsets"]
            dtype = np.dtype(_NAMES[entry["dtype"]] if entry["dtype"] != "BF16" else "uint16")
            array = np.frombuffer(mapped, dtype, (end - start) // dtype.itemsize, 8 + length + start)
            found[name] = array.reshape(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise ArtefactError(
            "The weights cannot be read",
            where=str(path),
            expected="a safetensors file",
            got=f"{type(error).__name__}: {error}",
            hint="compile the model again, or copy the whole folder again",
        ) from error
