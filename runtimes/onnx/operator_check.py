"""Every dialect operator of an exported file on the program's own inputs: a comparison that nothing amplifies.

The results of a whole network with quantized activations cannot be compared sharply: a sum in another order moves
a value across the rounding boundary of the next quantizer, and the difference grows from layer to layer. So the file's
graph is cut in front of each dialect operator and behind it; every operator gets what it got in the program's own run
(teacher forcing), in one session of ONNX Runtime, and its results are compared with those of that run. Float results
then differ by rounding, codes by at most one step in few places. What stands between the dialect operators is ONNX
that torch.onnx wrote, and is compared by the uncompressed model.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from torch import fx

from ...compiler.dialect import ONNX_DOMAIN, operator_of
from ...compiler.differences import Difference, array_of, compare_results, hides_codes, plain_codes, step_of
from ...compiler.errors import VerificationError
from ...compiler.graph import argument
from ...compiler.program import Program
from .session import open_session
from .translate import tensor_arguments


def operator_differences(
    program: Program,
    path: Path,
    library: Path | None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Compare every dialect operator of the file at `path`, which was exported from `program`.

    args, kwargs: inputs of the program (default: its examples). The cut graph is written beside `path` for as
    long as it takes, because its weights are in the file that `path` names. Raises VerificationError where the
    file has an operator that the program lacks, and ArtefactError where ONNX Runtime cannot open it.
    """
    args = program.example_args if args is None else args
    kwargs = program.example_kwargs if kwargs is None and args is program.example_args else (kwargs or {})
    values: dict[fx.Node, Any] = {}
    program.run_observed(values.__setitem__, args, kwargs)
    cut, feed, wanted = _cut(onnx.load(str(path), load_external_data=False), program, values)
    if not wanted:
        return []
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.onnx")
    try:
        onnx.save(cut, str(beside))
        session = open_session(beside, library=library)
        got = dict(zip(wanted, session.run(list(wanted), feed), strict=True))
    finally:
        beside.unlink(missing_ok=True)
    by_node: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    ops = {node.name: node.op_type for node in cut.graph.node}
    for name, (node, expected) in wanted.items():
        by_node.setdefault(node, []).append((got[name], expected))
    own = {node.name: node for node in values}
    found = [
        d
        for node, results in by_node.items()
        for d in compare_results(node, ops[node], plain_codes(own[node], results))
    ]
    return [replace(d, step=step_of(own[d.node], values)) if hides_codes(own[d.node]) else d for d in found]


def _cut(
    model: onnx.ModelProto, program: Program, values: Mapping[fx.Node, Any]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], dict[str, tuple[str, np.ndarray]]]:
    """The dialect's nodes alone, what to feed them, and (node, expected result) for every output."""
    own = {node.name: node for node in program.graph.nodes}
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node if n.domain == ONNX_DOMAIN]
    feed: dict[str, np.ndarray] = {}
    wanted: dict[str, tuple[str, np.ndarray]] = {}
    for node in nodes:
        source = own.get(node.name)
        operator = operator_of(source.target) if source is not None else None
        if source is None or operator is None or operator.onnx_name != node.op_type:
            raise VerificationError(
                "The file has an operator that the program lacks", where=node.name, got=node.op_type
            )
        names = tensor_arguments(operator)
        for position, given in enumerate(node.input):
            if given and given not in initializers:
                node.input[position] = f"{node.name}/{names[position]}"
                feed[node.input[position]] = array_of(values[argument(source, names[position])])
        results = values[source] if isinstance(values[source], (tuple, list)) else [values[source]]
        for name, result in zip(node.output, results, strict=False):
            if name:
                wanted[name] = (node.name, array_of(result))
    read = {name for node in nodes for name in node.input}
    weights = [
        onnx.TensorProto.FromString(initializers[n].SerializeToString()) for n in initializers if n in read
    ]
    for field in ("node", "initializer", "input", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    graph.input.extend(_port(name, array) for name, array in feed.items())
    graph.output.extend(_port(name, array) for name, (_, array) in wanted.items())
    return model, feed, wanted


def _port(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    """Type and rank; sizes stay free, as they are in the file."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    info: onnx.ValueInfoProto = helper.make_tensor_value_info(name, kind, [None] * array.ndim)
    return info
