"""Program → ONNX file with external data that runtimes map into memory as it is.

Tensors of 1 KiB and more go to one data file in the order in which the graph reads them. Each starts at a
multiple of 64 bytes (a cache line, what the kernels' aligned loads need), those of 64 KiB and more at a
multiple of 4096 (a page), so that ONNX Runtime maps the file and kernels read weights in place. The bytes
depend on the program alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from ...compiler.artefact import replacing
from ...compiler.memory import require_memory
from ...compiler.program import Program
from .translate import to_onnx

INLINE_BELOW = 1024
_LINE, _PAGE = 64, 4096
_PAGED_FROM = 65536


@dataclass(frozen=True)
class Written:
    """One finished file."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the files, and the model (its tensors point into the data file)."""

    files: tuple[Written, ...]
    model: ir.Model


def export_onnx(
    program: Program,
    model_path: Path,
    data_name: str,
    *,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Write `program` to `model_path` and its tensors to the file `data_name` beside it.

    Both files are written under temporary names and renamed when complete, the data first. Raises
    UnsupportedError for operators that cannot be lowered, InputError where memory will not do, ArtefactError
    where the folder cannot be written.
    """
    say = progress or (lambda _: None)
    # Transposed copies of unpacked weights that torch.onnx folds are the only new tensors of that size.
    require_memory(program.weight_bytes, "the export to ONNX")
    say("lower to ONNX")
    model = to_onnx(program)
    say("write weights")
    data_path = model_path.with_name(data_name)
    with ExitStack() as finished:
        # Contexts end in reverse: the data takes its name before the graph that refers to it.
        graph = finished.enter_context(replacing(model_path))
        data = finished.enter_context(replacing(data_path))
        weights = _write_external(model, data, data_name)
        proto = _to_proto(model).SerializeToString(deterministic=True)
        graph.write(proto)
    described = Written(model_path.name, len(proto), hashlib.sha256(proto).hexdigest())
    return Exported((described, weights), model)


def _to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model without the types of its initializers, which the initializers themselves carry.

    torch and onnx_ir repeat them with metadata. ONNX Runtime keeps what it reads: for BERT-base that is 0.3 MiB.
    """
    proto: onnx.ModelProto = ir.to_proto(model)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    kept = [info for info in proto.graph.value_info if info.name not in initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return proto


def _write_external(model: ir.Model, file: BinaryIO, location: str) -> Written:
    """Move large initializers to `file`; the model's initializers then point there."""
    digest = hashlib.sha256()
    position = 0

    def append(chunk: bytes | memoryview) -> None:
        nonlocal position
        file.write(chunk)
        digest.update(chunk)
        position += len(chunk)

    for value in _in_reading_order(model):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < INLINE_BELOW or tensor.dtype == ir.DataType.STRING:
            continue
        boundary = _PAGE if tensor.nbytes >= _PAGED_FROM else _LINE
        append(bytes(-position % boundary))
        offset = position
        append(_bytes_of(tensor))
        value.const_value = ir.ExternalTensor(
            location,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(_sizes(tensor)),
            name=str(value.name),
        )
    return Written(location, position, digest.hexdigest())


def _sizes(tensor: Any) -> list[int]:
    return [int(size) for size in tensor.shape]


def _bytes_of(tensor: Any) -> memoryview | bytes:
    """The tensor's little-endian bytes, without a copy where it is contiguous."""
    if tensor.dtype.bitwidth < 8:
        return bytes(tensor.tobytes())
    array: np.ndarray = tensor.numpy()
    if not array.size:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _in_reading_order(model: ir.Model) -> list[ir.Value]:
    """Initializers in the order of their first use, so that a run reads the file from front to back."""
    initializers = model.graph.initializers
    ordered: dict[str, ir.Value] = {}
    for node in model.graph.all_nodes():
        for source in node.inputs:
            if source is not None and source.is_initializer():
                ordered.setdefault(str(source.name), source)
    ordered.update({name: value for name, value in initializers.items() if name not in ordered})
    return list(ordered.values())
