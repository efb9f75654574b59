"""Running the plan of an operator with the emulator, against the operator's reference."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from torch import Tensor
from tvm import tirx
from tvm.sym import Analyzer

from isofold.compiler.dialect import OPERATORS
from isofold.runtimes.tvm.cuda.emulate import emulated
from isofold.runtimes.tvm.cuda.operators import EMITTERS
from isofold.runtimes.tvm.cuda.plan import Call, Operand, Plan

CACHE = Path(tempfile.gettempdir(), f"isofold-cuda-emulator-{os.getuid()}")


def arguments_of(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an operator's reference by name, defaults filled in."""
    bound = inspect.signature(OPERATORS[name].reference).bind(**arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def dtype_of(tensor: Tensor) -> str:
    """TVM's name of a tensor's element type."""
    return str(tensor.dtype).removeprefix("torch.")


def call_of(
    name: str, arguments: Mapping[str, Any], symbolic: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Call, dict[Any, int]]:
    """The call as an emitter sees it, and values of its symbols.

    symbolic: dimensions of tensors that the emitter must not know; equal sizes are one symbol.
    """
    operands: dict[str, Operand | None] = {}
    attributes: dict[str, Any] = {}
    variables: dict[int, Any] = {}
    tensors = _tensor_names(name)
    for argument, value in arguments.items():
        if argument not in tensors:
            attributes[argument] = list(value) if isinstance(value, (list, tuple)) else value
        elif value is None:
            operands[argument] = None
        else:
            shape: list[Any] = list(value.shape)
            for axis in (symbolic or {}).get(argument, ()):
                shape[axis] = variables.setdefault(shape[axis], tirx.Var(f"d{len(variables)}", "int64"))
            operands[argument] = Operand(tuple(shape), dtype_of(value))
    return Call(operands, attributes), {variable: size for size, variable in variables.items()}


def _tensor_names(name: str) -> set[str]:
    schema = OPERATORS[name].overload._schema
    return {a.name for a in schema.arguments if "Tensor" in str(a.type)}


def unique_functions(plans: Sequence[Plan]) -> tuple[dict[str, tirx.PrimFunc], list[list[str]]]:
    """The functions of plans under names of their own (equal ones once), and these names stage by stage."""
    functions: dict[str, tirx.PrimFunc] = {}
    names: list[list[str]] = []
    for plan in plans:
        names.append([])
        for stage in plan.stages:
            digest = tvm_ffi.structural_hash(stage.function.without_attr("global_symbol")) & (2**64 - 1)
            key = f"{stage.name}_{digest:x}"
            functions[key] = stage.function.with_attr("global_symbol", key)
            names[-1].append(key)
    return functions, names


def run_plans(
    plans: Sequence[Plan], arguments: Sequence[Mapping[str, Any]], sizes: Sequence[Mapping[Any, int]]
) -> list[list[Any]]:
    """The results of plans (None where one makes none), flat as the kernels write them; compiled together."""
    functions, names = unique_functions(plans)
    module = emulated(functions, CACHE)
    return [_run(module, *each) for each in zip(plans, names, arguments, sizes, strict=True)]


def _run(
    module: Any, plan: Plan, names: list[str], arguments: Mapping[str, Any], sizes: Mapping[Any, int]
) -> list[Any]:
    values: dict[str, Any] = {}
    symbols = {name: _evaluate(expression, sizes) for name, expression in plan.symbols.items()}

    def shape_of(shape: tuple[Any, ...]) -> list[int]:
        return [s if isinstance(s, int) else symbols[s] for s in shape]

    for name, shape in plan.views.items():
        source = arguments[name.partition("@")[0]].contiguous()
        values[name] = tvm.runtime.tensor(source.reshape(shape_of(shape)).numpy())
    for name, table in plan.constants.items():
        values[name] = tvm.runtime.tensor(table)
    for stage, function in zip(plan.stages, names, strict=True):
        for tensor in stage.outputs:
            values[tensor.name] = tvm.runtime.tensor(_poisoned(shape_of(tensor.shape), tensor.dtype))
        module[function](*(values[n] for n in [*stage.inputs, *(t.name for t in stage.outputs)]))
    made = {t.name: torch.from_numpy(values[t.name].numpy()) for stage in plan.stages for t in stage.outputs}
    return [None if name is None else made.get(name, arguments.get(name)) for name in plan.results]


def _poisoned(shape: list[int], dtype: str) -> np.ndarray[Any, Any]:
    """Memory in which what nobody writes shows."""
    return np.full(shape, np.nan if dtype.startswith("float") else 99, dtype)


def _evaluate(expression: Any, sizes: Mapping[Any, int]) -> int:
    analyzer = Analyzer()
    for variable, size in sizes.items():
        analyzer.bind(variable, tirx.const(size, "int64"))
    return int(analyzer.simplify(expression))


def emulate_operator(
    name: str, cases: Sequence[Mapping[str, Any]], symbolic: Mapping[str, tuple[int, ...]] | None = None
) -> list[list[Any]]:
    """Results of several uses of an operator from its GPU kernels, in the reference's shapes."""
    full = [arguments_of(name, arguments) for arguments in cases]
    calls = [call_of(name, arguments, symbolic) for arguments in full]
    results = run_plans([EMITTERS[name](call) for call, _ in calls], full, [sizes for _, sizes in calls])
    return [_shaped(name, arguments, found) for arguments, found in zip(full, results, strict=True)]


def reference_of(name: str, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The reference's results."""
    found = OPERATORS[name].reference(**arguments_of(name, arguments))
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _shaped(name: str, arguments: Mapping[str, Any], results: Sequence[Any]) -> list[Any]:
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    shapes = OPERATORS[name].overload(**meta)
    shapes = shapes if isinstance(shapes, (tuple, list)) else (shapes,)
    return [None if r is None else r.reshape(s.shape) for r, s in zip(results, shapes, strict=True)]
