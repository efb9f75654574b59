"""One dialect operator as an ONNX model, built without torch.onnx."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from torch import Tensor

from isofold.compiler.dialect import ONNX_DOMAIN, ONNX_VERSION, OPERATORS
from isofold.runtimes.onnx.body import OPSET
from isofold.runtimes.onnx.functions import build_function
from isofold.runtimes.onnx.translate import IR_VERSION, is_tensor


def model_of(name: str, arguments: dict[str, Any], constants: tuple[str, ...] = ()) -> ir.Model:
    """The operator on inputs of the given dtypes and shapes; those named in `constants` become initializers."""
    operator = OPERATORS[name]
    declared = operator.overload._schema.arguments
    inputs: dict[str, ir.Value | None] = {}
    for a in declared:
        if is_tensor(a):
            tensor = arguments[a.name]
            inputs[a.name] = None if tensor is None else _value(a.name, tensor, a.name in constants)
    attributes = [
        next(iter(ir.convenience.convert_attributes({a.name: _attribute(arguments[a.name])})))
        for a in declared
        if not is_tensor(a)
    ]
    function = build_function(name, inputs, attributes)
    outputs = len(operator.overload._schema.returns)
    node = ir.Node(
        ONNX_DOMAIN, operator.onnx_name, list(inputs.values()), attributes, num_outputs=outputs, name="n"
    )
    for index, output in enumerate(node.outputs):
        output.name = f"y{index}"
    given = [v for v in inputs.values() if v is not None]
    graph = ir.Graph(
        [v for v in given if v.const_value is None],
        list(node.outputs),
        nodes=[node],
        initializers=[v for v in given if v.const_value is not None],
        opset_imports={"": OPSET, ONNX_DOMAIN: ONNX_VERSION},
        name="single",
    )
    expected = operator.reference(**arguments)
    for output, result in zip(
        node.outputs, expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        output.type = ir.TensorType(ir.DataType.from_numpy(result.numpy().dtype))
        output.shape = ir.Shape([None] * result.dim())
    model = ir.Model(graph, ir_version=IR_VERSION)
    model.functions[function.identifier()] = function
    return model


def session_of(model: ir.Model, library: str | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, arguments: dict[str, Any], library: str | None = None) -> list[np.ndarray]:
    session = session_of(model, library)
    feed = {i.name: arguments[i.name].numpy() for i in session.get_inputs()}
    results: list[np.ndarray] = session.run(None, feed)
    return results


def _value(name: str, tensor: Tensor, constant: bool) -> ir.Value:
    array = tensor.numpy()
    return ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(list(array.shape)),
        const_value=ir.tensor(array, name=name) if constant else None,
    )


def _attribute(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value
