"""ONNX bodies of linears, convolutions and embeddings: decode the weight, then the float operator and its epilogue."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...compiler.dialect.element_formats import element_format
from ...compiler.dialect.packing import LANES, ceil_to
from ...compiler.errors import UnsupportedError
from .activation_functions import dequantized, quantize, quantize_activation
from .body import Body
from .coded_functions import codebook_weight, coded_weight
from .function_call import Call, Decode, Results
from .grouped_functions import grouped
from .sparse_functions import sparse_matrix
from .weight_functions import dense_weight, integer_weight, outlier_weight


def _activate(body: Body, x: ir.Value, activation: str) -> ir.Value:
    """The activation function that an operator's attribute names."""
    if activation == "none":
        return x
    if activation == "relu":
        return body("Relu", x)
    if activation == "gelu":
        return body("Gelu", x)
    if activation == "gelu_tanh":
        return body("Gelu", x, approximate="tanh")
    if activation == "silu":
        return body("Mul", x, body("Sigmoid", x))
    raise UnsupportedError("Unknown activation in an operator attribute", got=repr(activation))


def _linear(body: Body, x: ir.Value, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x matrix^T + bias."""
    y = body("MatMul", x, body.transpose(matrix, 1, 0))
    return y if bias is None else body("Add", y, bias)


def _packed_linear(body: Body, call: Call, x: ir.Value, decode: Decode = integer_weight) -> ir.Value:
    """`activation(x W^T + bias) + residual`, gated where the operator is; `decode` makes W from the packed weight."""
    n, k, activation = call.attributes["n"], call.attributes["k"], call.attributes["activation"]
    bias, residual = call.get("bias"), call.get("residual")
    if call.attributes["gated"]:
        rows = 2 * ceil_to(n, LANES)
        matrix = decode(body, call, rows, k)
        gate, up = (
            _linear(
                body,
                x,
                _half(body, matrix, half, (rows, k), n),
                None if bias is None else _half(body, bias, half, (rows,), n),
            )
            for half in (0, 1)
        )
        y = body("Mul", _activate(body, gate, activation), up)
    else:
        y = _activate(body, _linear(body, x, decode(body, call, n, k), bias), activation)
    return y if residual is None else body("Add", y, residual)


def _half(body: Body, interleaved: ir.Value, half: int, shape: tuple[int, ...], n: int) -> ir.Value:
    """Rows of the gate (0) or of the other factor (1) of a matrix whose rows alternate in blocks of 16."""
    blocks = body.reshape(interleaved, shape[0] // (2 * LANES), 2, LANES, *shape[1:])
    chosen = body("Gather", blocks, body.integer(half), axis=1)
    rows = body.reshape(chosen, shape[0] // 2, *shape[1:])
    return rows if n == shape[0] // 2 else body.slice(rows, 0, n, 0)


def linear_packed(call: Call, body: Body) -> Results:
    """`linear_packed`."""
    return (_packed_linear(body, call, dequantized(body, call)),)


def quantize_linear_packed(call: Call, body: Body) -> Results:
    """`quantize_linear_packed`: the two bodies, one after the other."""
    at = call.attributes
    rows = {name: call.get(name) for name in ("x", "params")}
    vectors = {"shift": call.get("pre_shift"), "scale": call.get("pre_scale")}
    rounding = {"align": 1, "bits": at["input_bits"], "hadamard": at["hadamard"]}
    u, params = quantize_activation(Call({**rows, **vectors}, rounding), body)
    return linear_packed(Call({**call.inputs, "u": u, "params": params}, at), body)


def linear_packed_float(call: Call, body: Body) -> Results:
    """`linear_packed_float`."""
    return (_packed_linear(body, call, call["x"]),)


def linear_outliers(call: Call, body: Body) -> Results:
    """`linear_outliers`."""
    return (_packed_linear(body, call, dequantized(body, call), outlier_weight),)


def linear_outliers_float(call: Call, body: Body) -> Results:
    """`linear_outliers_float`."""
    return (_packed_linear(body, call, call["x"], outlier_weight),)


def linear_coded(call: Call, body: Body) -> Results:
    """`linear_coded`."""
    return (_packed_linear(body, call, call["x"], coded_weight),)


def linear_fp8(call: Call, body: Body) -> Results:
    """`linear_fp8`."""
    codes = body.cast(body.slice(call["u"], 0, call.attributes["k"], -1), ir.DataType.INT32)
    values = body.constant(element_format("e4m3").values().numpy().astype(np.float32))
    x = body("Mul", body("Gather", values, codes, axis=0), call["params"])
    return (_packed_linear(body, call, x, coded_weight),)


def linear_codebook(call: Call, body: Body) -> Results:
    """`linear_codebook`."""
    return (_packed_linear(body, call, call["x"], codebook_weight),)


def linear_sparse(call: Call, body: Body) -> Results:
    """`linear_sparse`."""
    return (_packed_linear(body, call, dequantized(body, call), sparse_matrix),)


def linear_sparse_float(call: Call, body: Body) -> Results:
    """`linear_sparse_float`."""
    return (_packed_linear(body, call, call["x"], sparse_matrix),)


def linear_dense(call: Call, body: Body) -> Results:
    """`linear_dense`."""
    return (_packed_linear(body, call, call["x"], dense_weight),)


def _grouped(call: Call, body: Body, x: ir.Value, decode: Decode) -> Results:
    """Each row of x times the matrix of the expert that it chose; `decode` makes that from the packed weight."""
    n, k = call.attributes["n"], call.attributes["k"]

    def matrix(inner: Body, part: Callable[[ir.Value], ir.Value]) -> ir.Value:
        own: dict[str, ir.Value | None] = {}
        for name in ("weight", "scale", "zero"):
            held = call.inputs.get(name)
            own[name] = None if held is None else part(held)
            if held is not None:
                own[name].shape, own[name].type = ir.Shape(call.dimensions(name)[1:]), held.type  # type: ignore[union-attr]
        return decode(inner, Call(own, call.attributes), n, k)

    return (grouped(body, x, call["expert"], call.size("weight", 0), n, matrix, call.get("bias")),)


def linear_grouped(call: Call, body: Body) -> Results:
    """`linear_grouped`."""
    sizes = {"n": call.size("weight", 1), "k": call.size("weight", 2)}
    return _grouped(Call(call.inputs, sizes), body, call["input"], lambda _, own, *sizes: own["weight"])


def linear_grouped_packed(call: Call, body: Body) -> Results:
    """`linear_grouped_packed`."""
    return _grouped(call, body, dequantized(body, call), integer_weight)


def linear_grouped_packed_float(call: Call, body: Body) -> Results:
    """`linear_grouped_packed_float`."""
    return _grouped(call, body, call["x"], integer_weight)


def linear_grouped_dense(call: Call, body: Body) -> Results:
    """`linear_grouped_dense`."""
    return _grouped(call, body, call["x"], dense_weight)


def conv_packed(call: Call, body: Body) -> Results:
    """`conv_packed`."""
    at = call.attributes
    channels = call.size("x", 1)
    codes, scale, offset = quantize(body, call["x"], call.get("params"), range(1, call.rank("x")))
    x = body("Mul", body("Sub", codes, offset), scale)
    matrix = integer_weight(body, call, at["n"], channels * math.prod(at["kernel"]))
    weight = body.reshape(matrix, at["n"], channels, *at["kernel"])
    y = body(
        "Conv",
        x,
        weight,
        call.get("bias"),
        kernel_shape=list(at["kernel"]),
        strides=list(at["stride"]),
        pads=[*at["padding"], *at["padding"]],
        dilations=list(at["dilation"]),
    )
    return (_activate(body, y, at["activation"]),)


def _nibbles(body: Body, packed: ir.Value, axis: int) -> ir.Value:
    """Low and high nibbles stacked along a new axis, as uint8 of value code + 8."""
    eight, fifteen, four = (body.constant(np.array(v, dtype=np.uint8)) for v in (8, 15, 4))
    low = body("BitwiseAnd", packed, fifteen)
    high = body("BitShift", packed, four, direction="RIGHT")
    return body("BitwiseXor", body.stack([low, high], axis), eight)


def embedding_packed(call: Call, body: Body) -> Results:
    """`embedding_packed`: only the asked rows are decoded."""
    dim, bits, group = (call.attributes[name] for name in ("dim", "bits", "group_size"))
    lead = [0] * call.rank("ids")
    codes = body("Gather", call["weight"], call["ids"], axis=0)
    if bits == 8:
        rows = body.floats(codes)
    else:
        pairs = body.reshape(_nibbles(body, codes, len(lead) + 1), *lead, -1)
        rows = body("Sub", body.floats(body.slice(pairs, 0, dim, -1)), body.real(8.0))

    def per_element(name: str) -> ir.Value:
        values = body.floats(body("Gather", call[name], call["ids"], axis=0))
        if not group:
            return values
        spread = body(
            "Expand", body("Unsqueeze", values, body.ints(-1)), body.ints(*[1] * len(lead), 1, group)
        )
        return body.slice(body.reshape(spread, *lead, -1), 0, dim, -1)

    if call.get("zero") is not None:
        rows = body("Sub", rows, per_element("zero"))
    return (body("Mul", rows, per_element("scale")),)


def gated(call: Call, body: Body) -> Results:
    """`gated`."""
    return (body("Mul", _activate(body, call["gate"], call.attributes["activation"]), call["up"]),)
