"""Comparing an executable with its program: results, and each operator of the op library on the program's inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from ...compiler import differences
from ...compiler.dialect import OPERATORS, operator_of
from ...compiler.differences import Difference, array_of, compare_results, hides_codes, plain_codes, step_of
from ...compiler.graph import argument
from ...compiler.interface import input_names
from ...compiler.program import Program
from .executor import Executor, aligned, ffi
from .rules.dialect import DECODED, description, is_tensor


def check_results(program: Program, library: Path, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """`differences.check_results` of an executable in TVM's runtime."""
    executor = Executor(library, weights)
    names = input_names(program)
    return differences.check_results(
        program,
        str(library),
        lambda feed: executor.run([feed[name] for name in names]),
        lambda: operator_differences(program, executor),
    )


def operator_differences(program: Program, executor: Executor) -> list[Difference]:
    """Compare every operator of the op library with the program's own result on the program's own inputs."""
    values: dict[fx.Node, Any] = {}
    program.run_observed(values.__setitem__, program.example_args, program.example_kwargs)
    found: list[Difference] = []
    for node in program.graph.nodes:
        operator = operator_of(node.target) if node.op == "call_function" else None
        if operator is None or operator.name in DECODED:
            continue
        expected = values[node] if isinstance(values[node], (tuple, list)) else [values[node]]
        declared = operator.overload._schema.arguments
        given = {d.name: _value(argument(node, d.name), values) for d in declared}
        got = run_operator(executor, operator.name, given, list(expected))
        pairs = plain_codes(node, list(zip(got, map(array_of, expected), strict=True)))
        differences_ = compare_results(node.name, operator.onnx_name, pairs)
        if hides_codes(node):
            differences_ = [replace(d, step=step_of(node, values)) for d in differences_]
        found.extend(differences_)
    return found


def _value(given: Any, values: dict[fx.Node, Any]) -> Any:
    return values[given] if isinstance(given, fx.Node) else given


def run_operator(
    executor: Executor, name: str, given: dict[str, Any], like: list[torch.Tensor]
) -> list[np.ndarray]:
    """One operator of the dialect through the host; results have the shapes and types of `like`."""
    operator = OPERATORS[name]
    text = description(operator, given, [True] * len(like), name)
    tensor = ffi().from_dlpack
    declared = operator.overload._schema.arguments
    inputs = [array_of(given[d.name]) for d in declared if is_tensor(d) and given[d.name] is not None]
    results = [aligned(np.zeros(t.shape, array_of(t).dtype)) for t in like]
    executor.operator("isofold_op")(
        text, *(tensor(aligned(a)) for a in inputs), *(tensor(r) for r in results)
    )
    return results
