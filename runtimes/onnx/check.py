"""Checks of an exported file: packed weights stay packed, and the results are the program's.

ONNX Runtime optimizes a graph when it opens it. Where it inlines the body of a packed operator it folds the
decoded weight into a float constant, which costs up to eight times the memory. With the op library that must
never happen; so the optimized graph is read back and every packed node must still be there, reading the tensor
that was exported. Without the library it always happens to linears and convolutions; the report says how much.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch.utils import _pytree as pytree

from ...compiler.dialect import ONNX_DOMAIN, OPERATORS, operator_of
from ...compiler.errors import VerificationError
from ...compiler.program import Program
from .operator_check import Difference, operator_differences
from .session import open_session
from .translate import input_names, tensor_arguments

_EXACT, _ROUNDED = 1e-3, 0.2
"""Largest relative difference to the program: float arithmetic in another order; roundings that fall the other way."""

_OPERATOR, _SHARE = 1e-4, 0.01
"""What one operator on the program's own inputs may differ by: of its norm, and the share of codes off by one step."""


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
    if node.op_type == "PackedEmbedding":  # only the looked-up rows are decoded
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
    """Largest relative difference between the file's results and the program's on the example inputs.

    Raises VerificationError where it is more than rounding explains.
    """
    session = open_session(path, library=library)
    flat = program.flatten_inputs(program.example_args, program.example_kwargs)
    tensors = [v for v in flat if isinstance(v, torch.Tensor)]
    feed = {n: t.detach().cpu().numpy() for n, t in zip(input_names(program), tensors, strict=True)}
    got = session.run(None, feed)
    with torch.no_grad():
        leaves = pytree.tree_leaves(program(*program.example_args, **program.example_kwargs))
    nodes = pytree.tree_leaves(program.output_node.args[0], is_leaf=lambda v: v is None)
    want = [leaf for leaf, node in zip(leaves, nodes, strict=True) if isinstance(node, torch.fx.Node)]
    error = relative_difference([np.asarray(w) for w in want], got)
    rounds = rounds_activations(program)
    bound = _ROUNDED if rounds else _EXACT
    facts: dict[str, Any] = {"error": error, "bound": bound, "library": library is not None}
    if not error <= bound and rounds and math.isfinite(error):
        # Few bits amplify a rounding that falls the other way: then each operator has to agree by itself.
        facts["operators"] = _check_operators(program, path, library)
    elif not error <= bound:
        raise VerificationError(
            "The exported file does not compute what the program computes",
            where=str(path),
            expected=f"a relative difference of at most {bound:g}",
            got=f"{error:.3g}",
            hint="this is a defect of isofold's lowering; please report it with the model",
        )
    return facts


def _check_operators(program: Program, path: Path, library: Path | None) -> dict[str, Any]:
    """Largest differences of single operators on the program's own inputs. Raises VerificationError that lists them."""
    found = operator_differences(program, path, library)
    wrong = [d for d in found if not d.error <= _bound(d) and not _few_flips(d)]
    if wrong or not found:
        raise VerificationError(
            "The exported file does not compute what the program computes",
            where="; ".join(f"{d.node} ({d.op})" for d in wrong[:5]) or str(path),
            expected=f"each operator within {_OPERATOR:g}, codes within one step in at most {_SHARE:.1%}",
            got="; ".join(
                f"{d.error:.3g}, {d.differing} of {d.codes} codes by up to {d.steps}" for d in wrong[:5]
            )
            or "no operators",
            hint="this is a defect of isofold's lowering; please report it with the model",
        )
    return {
        "compared": len(found),
        "error": max(d.error for d in found),
        "steps": max(d.steps for d in found),
        "differing": sum(d.differing for d in found),
        "codes": sum(d.codes for d in found),
    }


def _bound(difference: Difference) -> float:
    """Largest error of one operator: codes inside it may differ like those that are results."""
    return max(_OPERATOR, math.sqrt(_SHARE) * difference.step)


def _few_flips(difference: Difference) -> bool:
    """Whether codes differ by one step in a few places (one or two of a small tensor are a large share)."""
    return difference.steps <= 1 and 0 < difference.differing <= max(2, _SHARE * difference.codes)


def rounds_activations(program: Program) -> bool:
    """Whether the program quantizes activations, so that a different last bit may become a different code."""
    quantizers = {
        "quantize_activation",
        "quantize_linear_packed",
        "norm_quantize",
        "conv_packed",
        "quantize_dequantize",
    }
    declared = (operator_of(node.target) for node in program.graph.nodes if node.op == "call_function")
    return any(operator is not None and operator.name in quantizers for operator in declared)


def relative_difference(want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """Largest difference over the largest magnitude, over all results; inf for other shapes or non-finite values."""
    worst = 0.0
    for expected, found in zip(want, got, strict=True):
        if expected.shape != found.shape:
            return math.inf
        if not expected.size:
            continue
        a, b = expected.astype(np.float64), found.astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(
            a[~finite], b[~finite], equal_nan=True
        ):
            return math.inf
        if finite.any():
            scale = max(float(np.abs(a[finite]).max()), 1e-30)
            worst = max(worst, float(np.abs(a[finite] - b[finite]).max()) / scale)
    return worst
