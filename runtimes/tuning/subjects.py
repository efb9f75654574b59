"""The workloads of a program or an artefact: one for each packed linear that it has, on its example inputs."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.errors import InputError
from .workloads import Workload

if TYPE_CHECKING:
    from ...compiler.program import Program

__all__ = ["packed_linears", "workloads_of_artefact", "workloads_of_program"]

_OPERATORS = {
    "linear_packed": "linear",
    "quantize_linear_packed": "linear",
    "linear_packed_float": "linear_float",
    "linear_dense": "linear_dense",
}
FACTS = ("k", "n", "bits", "group_size", "zero", "gated")
_ONNX = {
    "PackedLinear": "linear",
    "QuantizePackedLinear": "linear",
    "PackedLinearFloat": "linear_float",
    "DenseLinear": "linear_dense",
}


def workloads_of_program(program: Program, threads: int) -> list[Workload]:
    """Raises InputError where the program has no packed linear."""
    return _some(packed_linears(program, threads), "the compiled program")


def packed_linears(program: Program, threads: int) -> list[Workload]:
    """The workloads of a program: its linears and attentions that the op library runs; none where it has none."""
    from ...compiler.dialect.operator import operator_of
    from ...compiler.graph import argument, value

    found = []
    for node in program.graph.nodes:
        declared = operator_of(node.target) if node.op == "call_function" else None
        if declared is not None and declared.name == "attention":
            (_, m, _, k), keys = value(argument(node, "q")).shape, value(argument(node, "k")).shape[1]
            heads = int(argument(node, "heads"))
            found.append(Workload("attention", 32, 0, int(k), int(keys), int(m), threads, heads=heads))
        operator = None if declared is None else _OPERATORS.get(declared.name)
        if declared is not None and operator is not None:
            names = {a.name for a in declared.overload._schema.arguments}
            facts = {name: argument(node, name) for name in FACTS if name in names}
            rows = int(value(node).numel()) // int(facts["n"])
            found.append(_workload(operator, facts, rows, threads))
    return found


def workloads_of_artefact(folder: Path, threads: int) -> list[Workload]:
    """Rows are those of the artefact's own example inputs. Raises InputError where it has no packed linear."""
    import onnx

    from ..onnx.session import MODEL, open_artefact

    model = onnx.load(str(folder / MODEL), load_external_data=False)
    shapes = {
        node["name"]: node["outputs"][0] for node in open_artefact(folder).profile(runs=1) if node["outputs"]
    }
    found = []
    for node in model.graph.node:
        operator = _ONNX.get(node.op_type)
        if operator is None or node.name not in shapes:
            continue
        facts: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs = dict(zip(_inputs(model, node.op_type), node.input, strict=False))
        rows = prod(shapes[node.name]) // facts["n"]
        found.append(_workload(operator, {**facts, "zero": inputs.get("zero")}, rows, threads))
    return _some(found, str(folder))


def _inputs(model: Any, operator: str) -> list[str]:
    """The names of an operator's inputs, which its function body in the file has."""
    return next((list(f.input) for f in model.functions if f.name == operator), [])


def _workload(operator: str, facts: dict[str, Any], rows: int, threads: int) -> Workload:
    return Workload(
        operator,
        int(facts.get("bits", 32)),
        int(facts.get("group_size", 0)),
        int(facts["k"]),
        int(facts["n"]),
        max(rows, 1),
        threads,
        facts.get("zero") not in (None, ""),
        gated=bool(facts["gated"]),
    )


def _some(found: Iterable[Workload], where: str) -> list[Workload]:
    kept = sorted(set(found))
    if not kept:
        raise InputError(
            "There is no packed linear to tune",
            where=where,
            hint="choose a recipe that quantizes linears, or name no model to tune the default shapes",
        )
    return kept
