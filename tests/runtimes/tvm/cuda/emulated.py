"""Running the plan of an operator with the emulator, against the operator's reference."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor
from tvm import tirx
from tvm.sym import Analyzer

from isofold.compiler.dialect import OPERATORS
from isofold.runtimes.tvm.cuda.emulate import emulated
from isofold.runtimes.tvm.cuda.operators import EMITTERS
from isofold.runtimes.tvm.cuda.plan import Call, Operand, Plan

CACHE = Path(tempfile.gettempdir(), "isofold-cuda-emulator")


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


def run_plan(plan: Plan, arguments: Mapping[str, Any], sizes: Mapping[Any, int] | None = None) -> list[Any]:
    """The results of a plan (None where it makes none), flat as the kernels write them."""
    module = emulated({stage.name: stage.function for stage in plan.stages}, CACHE)
    values: dict[str, Any] = {}
    symbols = {name: _evaluate(expression, sizes or {}) for name, expression in plan.symbols.items()}

    def shape_of(shape: tuple[Any, ...]) -> list[int]:
        return [s if isinstance(s, int) else symbols[s] for s in shape]

    for name, shape in plan.views.items():
        values[name] = tvm.runtime.tensor(arguments[name.partition("@")[0]].contiguous().reshape(shape_of(shape)).numpy())
    for name, table in plan.constants.items():
        values[name] = tvm.runtime.tensor(table)
    for stage in plan.stages:
        for tensor in stage.outputs:
            values[tensor.name] = tvm.runtime.tensor(_poisoned(shape_of(tensor.shape), tensor.dtype))
        names = [*stage.inputs, *(t.name for t in stage.outputs)]
        module[stage.name](*(values[n] for n in names))
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
    name: str, arguments: Mapping[str, Any], symbolic: Mapping[str, tuple[int, ...]] | None = None
) -> list[Any]:
    """An operator's results from its GPU kernels, in the reference's shapes."""
    full = arguments_of(name, arguments)
    call, sizes = call_of(name, full, symbolic)
    results = run_plan(EMITTERS[name](call), full, sizes)
    shapes = OPERATORS[name].overload(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in full.items()})
    shapes = shapes if isinstance(shapes, (tuple, list)) else (shapes,)
    return [None if r is None else r.reshape(s.shape) for r, s in zip(results, shapes, strict=True)]
