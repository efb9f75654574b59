"""Runs one dialect operator as an ONNX model of one node, with the op library registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from isofold.compiler.dialect import ONNX_DOMAIN, OPERATORS
from isofold.runtimes.onnx.oplib.build import library_path

Sessions = Callable[..., onnxruntime.InferenceSession]


@pytest.fixture(scope="session")
def library() -> Path:
    return library_path()


def _attribute(value: Any) -> Any:
    return (
        int(value) if isinstance(value, bool) else list(value) if isinstance(value, (list, tuple)) else value
    )


def model_of(
    name: str,
    arguments: Sequence[Any],
    *,
    constants: Sequence[str] = (),
    outputs: Sequence[bool] | None = None,
    shapes: dict[str, list[str | int | None]] | None = None,
    attributes: dict[str, Any] | None = None,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, and its feeds.

    arguments are those of the torch operator; tensors named in `constants` become initializers. `outputs` says
    which outputs exist; `shapes` declares input shapes other than the tensors' own; `attributes` replaces some.
    """
    operator = OPERATORS[name]
    inputs: list[str] = []
    graph_inputs, initializers, feeds = [], [], {}
    found: dict[str, Any] = {}
    schema = operator.overload._schema
    defaults = [a.default_value for a in schema.arguments[len(arguments) :]]
    for argument, value in zip(schema.arguments, [*arguments, *defaults], strict=True):
        if "Tensor" not in str(argument.type):
            found[argument.name] = _attribute(value)
        elif value is None:
            inputs.append("")
        else:
            array = value.numpy() if isinstance(value, Tensor) else value
            inputs.append(argument.name)
            if argument.name in constants:
                initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), argument.name))
            else:
                shape = (shapes or {}).get(argument.name, list(array.shape))
                dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
                graph_inputs.append(helper.make_tensor_value_info(argument.name, dtype, shape))
                feeds[argument.name] = array
    while inputs and inputs[-1] == "":
        inputs.pop()
    count = len(schema.returns)
    present = [True] * count if outputs is None else list(outputs)
    names = [f"out{i}" if there else "" for i, there in enumerate(present)]
    dtype = [TensorProto.FLOAT] * count
    if name in ("quantize_activation", "quantize_activation_fp8", "norm_quantize"):
        dtype[count - 2] = TensorProto.UINT8
    graph_outputs = [
        helper.make_tensor_value_info(n, d, None) for n, d in zip(names, dtype, strict=True) if n
    ]
    found.update(attributes or {})
    empty = [name for name, value in found.items() if value == []]
    given = {name: value for name, value in found.items() if name not in empty}
    node = helper.make_node(operator.onnx_name, inputs, names, domain=ONNX_DOMAIN, **given)
    ints = onnx.AttributeProto.INTS  # make_node cannot tell the type of an empty list
    node.attribute.extend(helper.make_attribute(name, [], attr_type=ints) for name in empty)
    graph = helper.make_graph([node], "one", graph_inputs, graph_outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(ONNX_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


@pytest.fixture(scope="session")
def session(library: Path) -> Sessions:
    """`session(model, threads=1, parallel=False)`: an ONNX Runtime session with the op library."""

    def make(
        model: onnx.ModelProto, threads: int = 1, parallel: bool = False
    ) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if parallel:
            options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
            options.inter_op_num_threads = 2
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    return make


@pytest.fixture(scope="session")
def run_operator(session: Sessions) -> Callable[..., list[Tensor]]:
    """`run_operator(name, arguments, threads=1, **model_of's)`: the node's outputs as torch tensors."""

    def run(name: str, arguments: Sequence[Any], threads: int = 1, **options: Any) -> list[Tensor]:
        model, feeds = model_of(name, arguments, **options)
        return [torch.from_numpy(o) for o in session(model, threads).run(None, feeds)]

    return run


@pytest.fixture(scope="session")
def check(run_operator: Callable[..., list[Tensor]]) -> Callable[..., None]:
    """Compare with the dialect's reference in float64: `check(name, arguments, tolerance=..., ...)`."""

    def compare(name: str, arguments: Sequence[Any], tolerance: float = 1e-5, **options: Any) -> None:
        actual = run_operator(name, arguments, **options)
        wide = [a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments]
        expected = OPERATORS[name].reference(*wide)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, want in zip(actual, expected, strict=True):
            assert got.shape == want.shape
            if not got.numel():
                continue
            scale = max(1.0, float(want.double().abs().max()))
            error = float((got.double() - want.double()).abs().max())
            assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"

    return compare


@pytest.fixture
def make_model() -> Callable[..., tuple[onnx.ModelProto, dict[str, np.ndarray]]]:
    return model_of
