"""Checks of an exported file: packed weights stay packed, and the results are the program's.

ONNX Runtime optimizes a graph when it opens it. Where it inlines the body of a packed operator it folds the
decoded weight into a float constant, which costs up to eight times the memory. With the op library that must
never happen; so the optimized graph is read back and every packed node must still be there, reading the tensor
that was exported. Without the library it always happens to linears and convolutions; the report says how much.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from ...compiler import differences
from ...compiler.dialect import ONNX_DOMAIN, OPERATORS
from ...compiler.errors import VerificationError
from ...compiler.program import Program
from .operator_check import operator_differences
from .session import open_session
from .translate import tensor_arguments


@dataclass(frozen=True)
class PackedUse:
    """A node that reads a packed weight; `float_bytes` is what stock ONNX Runtime decodes it to (0: nothing)."""

    node: str
    op: str
    weight: str
    packed_bytes: int
    float_bytes: int


def packed_uses(model: ir.Model) -> list[PackedUse]:
    """Every node of the model that reads a packed weight."""
    by_onnx_name = {o.onnx_name: o for o in OPERATORS.values() if o.packed_argument is not None}
    uses = []
    for node in model.graph.all_nodes():
        operator = by_onnx_name.get(node.op_type) if node.domain == ONNX_DOMAIN else None
        if operator is None or operator.packed_argument is None:
            continue
        weight = node.inputs[tensor_arguments(operator).index(operator.packed_argument)]
        assert weight is not None
        assert weight.const_value is not None
        uses.append(
            PackedUse(
                str(node.name), node.op_type, str(weight.name), weight.const_value.nbytes, _float_bytes(node)
            )
        )
    return uses


def _float_bytes(node: ir.Node) -> int:
    at = {name: attribute.value for name, attribute in node.attributes.items()}
    # Only the looked-up rows are decoded, and only the experts that rows chose, one at a time.
    if node.op_type == "PackedEmbedding" or node.op_type.startswith("Grouped"):
        return 0
    if node.op_type == "PackedConv":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        assert shape is not None
        channels = shape[1]
        assert isinstance(channels, int)
        return 4 * int(at["n"]) * channels * math.prod(at["kernel"])
    rows = 2 * -(-int(at["n"]) // 16) * 16 if at["gated"] else int(at["n"])
    return 4 * rows * int(at["k"])


def check_packed(model: ir.Model, path: Path, library: Path | None) -> dict[str, Any]:
    """Facts about packed weights, for the report. Raises VerificationError where one grew with the library."""
    uses = packed_uses(model)
    grown = [use for use in uses if use.float_bytes]
    facts: dict[str, Any] = {
        "packed_nodes": len(uses),
        "packed_bytes": sum({use.weight: use.packed_bytes for use in uses}.values()),
        "without_library": {
            "note": "ONNX Runtime without the op library decodes these weights to float32 when it opens the file",
            "float_bytes": sum(use.float_bytes for use in grown),
            "nodes": [
                {"node": use.node, "bytes": use.packed_bytes, "float_bytes": use.float_bytes} for use in grown
            ],
        },
    }
    if library is None:
        return facts
    kept, constants = optimized_graph(path, library)
    lost = [use for use in uses if (use.op, use.weight) not in kept]
    if lost:
        raise VerificationError(
            "Packed weights grew back to float in ONNX Runtime's optimized graph",
            where="; ".join(
                f"{use.node} ({use.op}, {use.packed_bytes} to {use.float_bytes} bytes)" for use in lost
            ),
            expected="every packed operator runs as a kernel of the op library",
            hint=f"rebuild the library with isofold build; {library} may lack the operator",
        )
    facts["with_library"] = {"packed_nodes": len(uses), "constant_bytes": constants}
    return facts


def optimized_graph(path: Path, library: Path | None) -> tuple[set[tuple[str, str]], int]:
    """ONNX Runtime's version of a file: (operator, input) pairs of the dialect's nodes, bytes of constants."""
    with tempfile.TemporaryDirectory(prefix="isofold-check-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        (Path(folder) / "weights").symlink_to(
            "/dev/null"
        )  # only the structure is read, so no weight is stored

        def prepare(options: onnxruntime.SessionOptions) -> None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "weights"
            )
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
            )

        open_session(path, library=library, threads=1, prepare=prepare)
        graph = onnx.load(optimized, load_external_data=False).graph
    kept = {(n.op_type, source) for n in graph.node if n.domain == ONNX_DOMAIN for source in n.input}
    return kept, sum(_constant_bytes(tensor) for tensor in graph.initializer)


def _constant_bytes(tensor: onnx.TensorProto) -> int:
    width = ir.DataType(tensor.data_type).bitwidth
    return -(-math.prod(tensor.dims) * width // 8)


def check_results(program: Program, path: Path, library: Path | None) -> dict[str, Any]:
    """`differences.check_results` of the file at `path` in ONNX Runtime."""
    session = open_session(path, library=library)
    facts = differences.check_results(
        program,
        str(path),
        lambda feed: session.run(None, feed),
        lambda: operator_differences(program, path, library),
    )
    return {**facts, "library": library is not None}
