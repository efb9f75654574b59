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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import fx

from ...compiler.dialect import (
    ONNX_DOMAIN,
    linear_packed,
    operator_of,
    packing,
    quantize_activation,
    quantize_linear_packed,
)
from ...compiler.dialect.quantization import levels
from ...compiler.errors import VerificationError
from ...compiler.graph import argument
from ...compiler.program import Program
from .session import open_session
from .translate import tensor_arguments


@dataclass(frozen=True)
class Difference:
    """One result of one operator.

    error: norm of the difference over norm (of codes: over their parameters' scales).
    steps, differing, codes: of codes, the largest difference in steps of the quantizer, how many differ at all, and
    how many there are.
    step: of a result computed from codes inside the operator that may differ, the error when all of them are off by
    one step, up or down at random. Where a share p of them is, expect sqrt(p) of it.
    """

    node: str
    op: str
    error: float
    steps: int = 0
    differing: int = 0
    codes: int = 0
    step: float = 0.0


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
    found = [d for node, results in by_node.items() for d in _compare(node, ops[node], results)]
    own = {node.name: node for node in values}
    return [replace(d, step=_step(own[d.node], values)) if _hides_codes(own[d.node]) else d for d in found]


def _hides_codes(node: fx.Node) -> bool:
    """Whether another order of sums inside the operator may move codes that are no result."""
    return node.target == quantize_linear_packed.overload and bool(argument(node, "hadamard"))


def _step(node: fx.Node, values: Mapping[fx.Node, Any]) -> float:
    """`Difference.step` of a linear with its quantizer inside."""
    declared = [a.name for a in quantize_linear_packed.overload._schema.arguments]
    given = {name: argument(node, name) for name in declared}
    given = {name: values[held] if isinstance(held, fx.Node) else held for name, held in given.items()}
    rounding = [given[name] for name in ("pre_shift", "pre_scale", "input_bits", "hadamard")]
    align = packing.alignment(given["group_size"])
    u, pair = quantize_activation.reference(given["x"], given["params"], align, *rounding)
    random = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, u.shape, generator=random) - 1
    moved = (u.int() + signs).clamp(0, int(levels(given["input_bits"]))).to(torch.uint8)
    rest = [given[name] for name in declared[declared.index("weight") : declared.index("input_bits")]]
    return _relative(_array(linear_packed.reference(moved, pair, *rest)), _array(values[node]))


def share_of_codes(differences: Sequence[Difference]) -> float:
    """Share of all codes that differ; of one small tensor's codes a single one may be a percent."""
    return sum(d.differing for d in differences) / max(sum(d.codes for d in differences), 1)


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
                feed[node.input[position]] = _array(values[argument(source, names[position])])
        results = values[source] if isinstance(values[source], (tuple, list)) else [values[source]]
        for name, result in zip(node.output, results, strict=False):
            if name:
                wanted[name] = (node.name, _array(result))
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


def _array(tensor: Any) -> np.ndarray:
    assert isinstance(tensor, torch.Tensor)
    array: np.ndarray = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array if tensor.dim() else array.reshape(())


def _port(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    """Type and rank; sizes stay free, as they are in the file."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    info: onnx.ValueInfoProto = helper.make_tensor_value_info(name, kind, [None] * array.ndim)
    return info


def _compare(node: str, op: str, results: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Difference]:
    """Differences of one node's results (got, expected); codes are read with the parameters that follow them."""
    found: list[Difference] = []
    index = 0
    while index < len(results):
        got, expected = results[index]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            found.append(Difference(node, op, float("inf"), 255, got.size, got.size))
        elif expected.dtype == np.uint8:
            index += 1
            found.append(_codes(node, op, (got, expected), results[index]))
        else:
            found.append(Difference(node, op, _relative(got, expected)))
        index += 1
    return found


def _codes(
    node: str, op: str, codes: tuple[np.ndarray, np.ndarray], params: tuple[np.ndarray, np.ndarray]
) -> Difference:
    """Codes count from their zero points: a zero point that rounds the other way takes its codes with it."""
    got, expected = (
        u.astype(np.int64) - p[..., 1:].astype(np.int64) for u, p in zip(codes, params, strict=True)
    )
    away = np.abs(got - expected)
    error = _relative(params[0][..., 0], params[1][..., 0])
    return Difference(node, op, error, int(away.max(initial=0)), int(np.count_nonzero(away)), away.size)


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over norm; infinite where one side alone is not finite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    return float(np.linalg.norm(a[finite] - b[finite]) / max(float(np.linalg.norm(b[finite])), 1e-30))
