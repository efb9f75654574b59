"""Every dialect operator as a function of standard ONNX operators.

Exported nodes have the operator's own name in the domain `ai.isofold`. Where the op library is registered
ONNX Runtime runs its kernel; where it is not, it runs these bodies, which decode the packed layouts exactly
(docs/dialect.md) and repeat the arithmetic of the PyTorch references.

ONNX has no way to ask inside a function whether an optional input is there, so a body is built for one
signature: which inputs are present, their ranks, and the values of the attributes. Different signatures of
one operator become overloads of one function (`overload` of FunctionProto, IR version 10). An operator with
one signature in a model has the empty overload. ONNX Runtime up to 1.26 ignores overloads, so there files with several
signatures of one operator need the op library (which never looks at bodies); 1.28 and newer run them without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...compiler.dialect import ONNX_DOMAIN, OPERATORS
from ...compiler.dialect.element_formats import element_format, scale_values
from ...compiler.dialect.packing import LANES, ceil_to, zero_steps
from ...compiler.dialect.quantization import LEAST_SCALE, levels
from ...compiler.dialect.quantization_fp8 import LARGEST, NAN_CODE
from ...compiler.errors import UnsupportedError
from ...compiler.hadamard import steps
from ...compiler.hadamard_orders import signs
from .body import Body
from .grouped_functions import grouped
from .sparse_functions import sparse_matrix

Results = tuple[ir.Value, ...]
Builder = Callable[["Call", Body], Results]
Decode = Callable[[Body, "Call", int, int], ir.Value]


@dataclass(frozen=True)
class Call:
    """One use of an operator: what its body may depend on.

    inputs: formal inputs by name, None where absent (they carry the dtype and shape of the use).
    attributes: the non-tensor arguments by name.
    """

    inputs: Mapping[str, ir.Value | None]
    attributes: Mapping[str, Any]

    def __getitem__(self, name: str) -> ir.Value:
        """A present input."""
        value = self.inputs[name]
        assert value is not None, f"input {name} is absent"
        return value

    def get(self, name: str) -> ir.Value | None:
        """An input that may be absent."""
        return self.inputs[name]

    def rank(self, name: str) -> int:
        """Number of dimensions of an input."""
        return len(self.dimensions(name))

    def dimensions(self, name: str) -> list[int | None]:
        """Sizes of an input, None where they are not static."""
        shape = self[name].shape
        assert shape is not None, f"input {name} has no shape"
        return [d if isinstance(d, int) else None for d in shape]

    def size(self, name: str, axis: int) -> int:
        """A size that must be static. Raises UnsupportedError."""
        found = self.dimensions(name)[axis]
        if found is None:
            raise UnsupportedError(
                f"Dimension {axis} of {name!r} must have a fixed size to be exported to ONNX",
                hint="only batch and sequence-like dimensions may be dynamic",
            )
        return found


def _activate(body: Body, x: ir.Value, activation: str) -> ir.Value:
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


def _quantize(
    body: Body, x: ir.Value, params: ir.Value | None, axes: Sequence[int], bits: int = 8
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes (as floats), scale and zero point."""
    zero, largest = body.real(0.0), body.real(levels(bits))
    if params is None:
        over = body.ints(*axes)
        low = body("Min", body("ReduceMin", x, over, keepdims=1), zero)
        high = body("Max", body("ReduceMax", x, over, keepdims=1), zero)
        spread = body("Div", body("Sub", high, low), largest)
        scale = body("Where", body("GreaterOrEqual", spread, body.real(LEAST_SCALE)), spread, body.real(1.0))
        offset = body("Clip", body("Round", body("Div", body("Neg", low), scale)), zero, largest)
    else:
        scale = body("Gather", params, body.constant(np.array(0, dtype=np.int64)), axis=0)
        offset = body("Gather", params, body.constant(np.array(1, dtype=np.int64)), axis=0)
    # 1 / scale, spelled so that ONNX Runtime does not make x / scale of it, which rounds elsewhere.
    half = body.real(0.5)
    inverse = body("Div", half, body("Mul", scale, half))
    rounded = body("Round", body("Mul", x, inverse))
    return body("Clip", body("Add", rounded, offset), zero, largest), scale, offset


def _quantize_activation(body: Body, call: Call, x: ir.Value) -> Results:
    """Codes and pairs of a row x, with the params, shift, scale, align and bits of the call."""
    params = call.get("params")
    x = _transformed(body, call, x)
    codes, scale, offset = _quantize(body, x, params, [-1], call.attributes["bits"])
    pair = body("Identity", params) if params is not None else body("Concat", scale, offset, axis=-1)
    return _padded_codes(body, call, codes), pair


def _transformed(body: Body, call: Call, x: ir.Value) -> ir.Value:
    """`((x - shift) * scale) H` of a quantizer."""
    shift, factor = call.get("shift"), call.get("scale")
    x = x if shift is None else body("Sub", x, shift)
    x = x if factor is None else body("Mul", x, factor)
    return _hadamard(body, x, call.attributes["hadamard"], False) if call.attributes["hadamard"] else x


def _padded_codes(body: Body, call: Call, codes: ir.Value) -> ir.Value:
    """Codes (as floats) as bytes, padded to the call's `align`."""
    width = call.size("x", -1)
    padding = ceil_to(width, call.attributes["align"]) - width
    if padding:
        codes = body("Pad", codes, body.ints(0, padding), body.real(0.0), body.ints(-1))
    return body.cast(codes, ir.DataType.UINT8)


def _scaled_fp8(body: Body, x: ir.Value, params: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """x over its FP8 scale within the range of E4M3, and that scale."""
    if params is None:
        largest = body("ReduceMax", body("Abs", x), body.ints(-1), keepdims=1)
        scale = body("Div", largest, body.real(LARGEST))
        scale = body("Where", body("Less", scale, body.real(LEAST_SCALE)), body.real(1.0), scale)
    else:
        scale = params
    # 1 / scale, spelled so that ONNX Runtime does not make x / scale of it, which rounds elsewhere.
    two = body.real(2.0)
    y = body("Mul", x, body("Div", two, body("Mul", scale, two)))
    return body("Clip", y, body.real(-LARGEST), body.real(LARGEST)), scale


def _codes_fp8(body: Body, y: ir.Value) -> ir.Value:
    """E4M3 codes (as floats) of y: with m steps of 2^(e - 3), 8 (e + 6) + m, which carries where m is rounded up to 16.

    e is the exponent of the magnitude, -6 below 2^-6. Where it is one too large, just below a power of two, the
    coarser steps round to the same value.
    """
    magnitude = body("Abs", y)
    logarithm = body("Mul", body("Log", magnitude), body.real(1 / math.log(2)))
    exponent = body(
        "Clip", body("Floor", body("Add", logarithm, body.real(0.01))), body.real(-6.0), body.real(8.0)
    )
    place = body("Add", exponent, body.real(6.0))
    steps = body.constant(np.ldexp(np.float32(1), 9 - np.arange(15)).astype(np.float32))
    step = body("Gather", steps, body.cast(place, ir.DataType.INT32), axis=0)
    code = body("Add", body("Mul", place, body.real(8.0)), body("Round", body("Mul", magnitude, step)))
    sign = body("Where", body("Less", y, body.real(0.0)), body.real(128.0), body.real(0.0))
    return body("Where", body("IsNaN", y), body.real(float(NAN_CODE)), body("Add", code, sign))


def _byte(body: Body, value: int) -> ir.Value:
    return body.constant(np.array(value, dtype=np.uint8))


def _field(body: Body, packed: ir.Value, low: int, width: int) -> ir.Value:
    """Bits low..low+width-1 of each byte."""
    shifted = packed if low == 0 else body("BitShift", packed, _byte(body, low), direction="RIGHT")
    return shifted if low + width == 8 else body("BitwiseAnd", shifted, _byte(body, (1 << width) - 1))


def _nibbles(body: Body, packed: ir.Value, axis: int) -> ir.Value:
    """Low and high nibbles stacked along a new axis, as uint8 of value code + 8."""
    eight, fifteen, four = (body.constant(np.array(v, dtype=np.uint8)) for v in (8, 15, 4))
    low = body("BitwiseAnd", packed, fifteen)
    high = body("BitShift", packed, four, direction="RIGHT")
    return body("BitwiseXor", body.stack([low, high], axis), eight)


def _weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]`."""
    bits, group = call.attributes.get("bits", 8), call.attributes.get("group_size", 0)
    multiplier = call.attributes.get("scale_multiplier", 1.0)
    padded = call.size("weight", 0) * LANES
    codes, width = _codes(body, call, bits, padded)

    def per_group(name: str) -> ir.Value:
        values = body.transpose(body.floats(call[name]), 0, 2, 1)
        return body.reshape(values, padded, call.size(name, 1), 1)

    codes = body.reshape(codes, padded, width // group if group else 1, group or width)
    if call.inputs.get("zero") is not None:
        zero = per_group("zero")
        if zero_steps(bits) > 1:
            zero = body("Mul", zero, body.real(1 / zero_steps(bits)))
        codes = body("Sub", codes, zero)
    scale = per_group("scale")
    if multiplier != 1.0:
        scale = body("Mul", scale, body.real(multiplier))
    matrix = body.reshape(body("Mul", codes, scale), padded, width)
    if width != k:
        matrix = body.slice(matrix, 0, k, 1)
    return matrix if padded == rows else body.slice(matrix, 0, rows, 0)


def _codes(body: Body, call: Call, bits: int, rows: int) -> tuple[ir.Value, int]:
    """The codes of all padded rows as floats, `[rows, Kp]` up to a reshape, and Kp."""
    weight, blocks = call["weight"], call.size("weight", 1)
    if bits == 8:
        return body.floats(body.reshape(body.transpose(weight, 0, 2, 1, 3), rows, blocks * 4)), blocks * 4

    if bits == 3:
        planes = [
            body("Gather", weight, body.constant(np.array(p, dtype=np.int64)), axis=2) for p in range(3)
        ]
        steps = [_field(body, plane, low, 3) for plane in planes for low in (5, 2)]
        for i in range(2):
            sign = body("BitShift", _field(body, planes[2], i, 1), _byte(body, 2), direction="LEFT")
            steps.append(body("BitwiseOr", _field(body, planes[i], 0, 2), sign))
    else:
        steps = [_field(body, weight, bits * q, bits) for q in range(8 // bits)]
    half = 1 << (bits - 1)
    shifted = body("BitwiseXor", body.stack(steps, 2), _byte(body, half))  # two's complement: code + half
    ordered = body.transpose(shifted, 0, 3, 1, 2, 4)
    width = blocks * len(steps) * 4
    return body("Sub", body.floats(body.reshape(ordered, rows, width)), body.real(float(half))), width


def _decoded(body: Body, call: Call, codes: ir.Value) -> ir.Value:
    """Values of codes in the call's `format`."""
    entries = call.inputs.get("table")
    if entries is None:
        # No code of a weight is NaN or infinity: finite entries keep padding, which meets zeros, finite too.
        values = element_format(call.attributes["format"]).values().nan_to_num(0.0, 0.0, 0.0)
        entries = body.constant(values.numpy().astype(np.float32))
    return body("Gather", entries, body.cast(codes, ir.DataType.INT32), axis=0)


def _decoded_scale(body: Body, call: Call, stored: ir.Value) -> ir.Value:
    """Values of scales as the call's `format` stores them."""
    form = element_format(call.attributes["format"])
    if form.scale == "float":
        return body.floats(stored)
    known = scale_values(torch.arange(256).to(torch.uint8), form, torch.float32).nan_to_num(0.0)
    return body("Gather", body.constant(known.numpy()), body.cast(stored, ir.DataType.INT32), axis=0)


def _coded_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]` of `linear_coded`."""
    form, group = element_format(call.attributes["format"]), call.attributes["group_size"]
    blocks, steps = call.size("weight", 0), call.size("weight", 1)
    packed = call["weight"]

    if form.bits == 8:
        width = steps * 2
        codes = body.reshape(body.transpose(packed, 0, 2, 1, 3), blocks * LANES, width)
    elif form.bits == 4:
        width = steps * 8
        both = body.stack([_field(body, packed, low, 4) for low in (0, 4)], 2)
        codes = body.reshape(body.transpose(both, 0, 3, 1, 2, 4), blocks * LANES, width)
    else:
        width = steps // 3 * 8
        words = body.transpose(body.reshape(packed, blocks, steps // 3, 3, LANES, 2), 0, 3, 1, 2, 4)
        words = body.reshape(words, blocks * LANES, steps // 3, 6)
        pairs, top = body.slice(words, 0, 4, 2), body.slice(words, 4, 6, 2)
        low = body.reshape(
            body.stack([_field(body, pairs, low, 4) for low in (0, 4)], 3), blocks * LANES, width
        )
        parts = [_field(body, top, low, 2) for low in (0, 2, 4, 6)]
        high = body.reshape(body.stack(parts, 3), blocks * LANES, width)
        codes = body("BitwiseOr", low, body("BitShift", high, _byte(body, 4), direction="LEFT"))
    values = _decoded(body, call, codes)
    values = body.reshape(values, blocks * LANES, width // group if group else 1, group or width)
    scale = _decoded_scale(body, call, body.transpose(call["scale"], 0, 2, 1))
    scale = body.reshape(scale, blocks * LANES, call.size("scale", 1), 1)
    multiplier = call.attributes["scale_multiplier"]
    if multiplier != 1.0:
        scale = body("Mul", scale, body.real(multiplier))
    matrix = body.reshape(body("Mul", values, scale), blocks * LANES, width)
    if width != k:
        matrix = body.slice(matrix, 0, k, 1)
    return matrix if blocks * LANES == rows else body.slice(matrix, 0, rows, 0)


def _dense_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The matrix float32 `[rows, k]` of panels `[blocks, k, 32]`."""
    height = call.size("weight", 0) * call.size("weight", 2)
    matrix = body.reshape(body("Transpose", call["weight"], perm=[0, 2, 1]), height, k)
    return matrix if height == rows else body.slice(matrix, 0, rows, 0)


def _outliers(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """S of `outlier_packing` as a float32 matrix `[rows, k]`."""
    panels, steps = call.size("offsets", 0) - 1, call.size("places", 0)
    count = panels * LANES
    one = body.constant(np.array(1, dtype=np.int64))
    # The panel of a step: how many panels begin at or before it, the first one not counted.
    starts = body.cast(body.slice(call["offsets"], 1, panels, 0), ir.DataType.INT64)
    marks = body("Expand", one, body.ints(panels - 1))
    none = body.constant(np.zeros(steps + 1, dtype=np.int64))
    begun = body("ScatterElements", none, starts, marks, axis=0, reduction="add")
    panel = body.slice(body("CumSum", begun, body.constant(np.array(0, dtype=np.int64))), 0, steps, 0)
    first = body("Mul", body("Unsqueeze", panel, body.ints(1)), body.ints(LANES))
    row = body("Add", first, body.constant(np.arange(LANES, dtype=np.int64)[None]))
    places = body.cast(call["places"], ir.DataType.INT64)
    index = body.reshape(body("Add", body("Mul", row, body.ints(k)), places), -1)
    values = body.reshape(body.floats(call["values"]), -1)
    if call.attributes["outlier_multiplier"] != 1.0:
        values = body("Mul", values, body.real(call.attributes["outlier_multiplier"]))
    zeros = body("Expand", body.real(0.0), body.ints(count * k))
    matrix = body.reshape(body("ScatterElements", zeros, index, values, axis=0, reduction="add"), count, k)
    return matrix if count == rows else body.slice(matrix, 0, rows, 0)


def _outlier_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]` of integers and outliers."""
    return body("Add", _weight(body, call, rows, k), _outliers(body, call, rows, k))


def _codebook_vectors(
    body: Body, call: Call, codes: ir.Value, rows: int, groups: int, count: int
) -> ir.Value:
    """Sums of the vectors that codes `[rows, groups, count]` choose: `[rows, 8 groups]`."""
    index = body.cast(codes, ir.DataType.INT32)
    total = None
    for m in range(count):
        chosen = body("Gather", index, body.constant(np.array(m, dtype=np.int64)), axis=2)
        book = body("Gather", call["codebooks"], body.constant(np.array(m, dtype=np.int64)), axis=0)
        part = body("Gather", body.floats(book), chosen, axis=0)
        total = part if total is None else body("Add", total, part)
    assert total is not None
    return body.reshape(total, rows, groups * 8)


def _codebook_weight(body: Body, call: Call, rows: int, k: int) -> ir.Value:
    """The decoded matrix float32 `[rows, k]` of `linear_codebook`."""
    blocks, groups, lanes, count = (call.size("weight", axis) for axis in range(4))
    codes = body.reshape(body.transpose(call["weight"], 0, 2, 1, 3), blocks * lanes, groups, count)
    scale = body.reshape(call["scale"], blocks * lanes, 1)
    matrix = body("Mul", _codebook_vectors(body, call, codes, blocks * lanes, groups, count), scale)
    if groups * 8 != k:
        matrix = body.slice(matrix, 0, k, 1)
    return matrix if blocks * lanes == rows else body.slice(matrix, 0, rows, 0)


def _linear(body: Body, x: ir.Value, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
    y = body("MatMul", x, body.transpose(matrix, 1, 0))
    return y if bias is None else body("Add", y, bias)


def _packed_linear(body: Body, call: Call, x: ir.Value, decode: Decode = _weight) -> ir.Value:
    """Decoded linear, activation or gating, residual."""
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
    """Rows of the gate (0) or of the other factor (1) from rows interleaved in blocks."""
    blocks = body.reshape(interleaved, shape[0] // (2 * LANES), 2, LANES, *shape[1:])
    chosen = body("Gather", blocks, body.constant(np.array(half, dtype=np.int64)), axis=1)
    rows = body.reshape(chosen, shape[0] // 2, *shape[1:])
    return rows if n == shape[0] // 2 else body.slice(rows, 0, n, 0)


def _norm(body: Body, call: Call) -> Results:
    x, residual, weight, bias = call["x"], call.get("residual"), call.get("weight"), call.get("bias")
    total = body("Identity", x) if residual is None else body("Add", x, residual)
    eps = call.attributes["eps"]
    if call.attributes["kind"] == "layer":
        if weight is None:
            weight = body.constant(np.ones(call.size("x", -1), dtype=np.float32))
        return total, body("LayerNormalization", total, weight, bias, axis=-1, epsilon=eps)
    mean = body("ReduceMean", body("Pow", total, body.real(2.0)), body.ints(-1), keepdims=1)
    y = body("Div", total, body("Sqrt", body("Add", mean, body.real(eps))))
    y = y if weight is None else body("Mul", y, weight)
    return total, y if bias is None else body("Add", y, bias)


def quantize_activation(call: Call, body: Body) -> Results:
    """`quantize_activation`."""
    return _quantize_activation(body, call, call["x"])


def linear_packed(call: Call, body: Body) -> Results:
    """`linear_packed`."""
    return (_packed_linear(body, call, _dequantized(body, call)),)


def _dequantized(body: Body, call: Call) -> ir.Value:
    """The activations that codes `u` and pairs `params` stand for."""
    codes = body.floats(body.slice(call["u"], 0, call.attributes["k"], -1))
    scale, zero = (body.slice(call["params"], i, i + 1, -1) for i in (0, 1))
    return body("Mul", body("Sub", codes, zero), scale)


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


def _grouped(call: Call, body: Body, x: ir.Value, decode: Decode) -> Results:
    """Rows x times the matrix that `decode` makes of the weights of their expert."""
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
    return _grouped(call, body, _dequantized(body, call), _weight)


def linear_grouped_packed_float(call: Call, body: Body) -> Results:
    """`linear_grouped_packed_float`."""
    return _grouped(call, body, call["x"], _weight)


def linear_grouped_dense(call: Call, body: Body) -> Results:
    """`linear_grouped_dense`."""
    return _grouped(call, body, call["x"], _dense_weight)


def linear_outliers(call: Call, body: Body) -> Results:
    """`linear_outliers`."""
    return (_packed_linear(body, call, _dequantized(body, call), _outlier_weight),)


def linear_outliers_float(call: Call, body: Body) -> Results:
    """`linear_outliers_float`."""
    return (_packed_linear(body, call, call["x"], _outlier_weight),)


def linear_coded(call: Call, body: Body) -> Results:
    """`linear_coded`."""
    return (_packed_linear(body, call, call["x"], _coded_weight),)


def linear_codebook(call: Call, body: Body) -> Results:
    """`linear_codebook`."""
    return (_packed_linear(body, call, call["x"], _codebook_weight),)


def quantize_activation_fp8(call: Call, body: Body) -> Results:
    """`quantize_activation_fp8`."""
    params = call.get("params")
    y, scale = _scaled_fp8(body, _transformed(body, call, call["x"]), params)
    found = body("Identity", params) if params is not None else scale
    return _padded_codes(body, call, _codes_fp8(body, y)), found


def quantize_dequantize_fp8(call: Call, body: Body) -> Results:
    """`quantize_dequantize_fp8`: ONNX's own conversion."""
    y, scale = _scaled_fp8(body, call["x"], call.get("params"))
    rounded = body.floats(body.cast(y, ir.DataType.FLOAT8E4M3FN))
    return (body("Mul", rounded, scale),)


def linear_fp8(call: Call, body: Body) -> Results:
    """`linear_fp8`."""
    codes = body.cast(body.slice(call["u"], 0, call.attributes["k"], -1), ir.DataType.INT32)
    values = body.constant(element_format("e4m3").values().numpy().astype(np.float32))
    x = body("Mul", body("Gather", values, codes, axis=0), call["params"])
    return (_packed_linear(body, call, x, _coded_weight),)


def dequantize_codebook(call: Call, body: Body) -> Results:
    """`dequantize_codebook`."""
    sizes = (call.size("codes", axis) for axis in range(3))
    vectors = _codebook_vectors(body, call, call["codes"], *sizes)
    matrix = body("Mul", vectors, body("Unsqueeze", call["scale"], body.ints(1)))
    return (body.slice(matrix, 0, call.attributes["k"], 1),)


def dequantize_coded(call: Call, body: Body) -> Results:
    """`dequantize_coded`."""
    group = call.attributes["group_size"]
    values = _decoded(body, call, call["codes"])
    scale = body("Mul", _decoded_scale(body, call, call["scale"]), call["multiplier"])
    if group:
        n, k, groups = call.size("codes", 0), call.size("codes", 1), call.size("scale", 1)
        spread = body("Expand", body.reshape(scale, n, groups, 1), body.ints(n, groups, group))
        scale = body.slice(body.reshape(spread, n, groups * group), 0, k, 1)
    return (body("Mul", values, scale),)


def linear_sparse(call: Call, body: Body) -> Results:
    """`linear_sparse`."""
    return (_packed_linear(body, call, _dequantized(body, call), sparse_matrix),)


def linear_sparse_float(call: Call, body: Body) -> Results:
    """`linear_sparse_float`."""
    return (_packed_linear(body, call, call["x"], sparse_matrix),)


def linear_dense(call: Call, body: Body) -> Results:
    """`linear_dense`."""
    return (_packed_linear(body, call, call["x"], _dense_weight),)


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


def conv_packed(call: Call, body: Body) -> Results:
    """`conv_packed`."""
    at = call.attributes
    channels = call.size("x", 1)
    codes, scale, offset = _quantize(body, call["x"], call.get("params"), range(1, call.rank("x")))
    x = body("Mul", body("Sub", codes, offset), scale)
    matrix = _weight(body, call, at["n"], channels * math.prod(at["kernel"]))
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


def norm(call: Call, body: Body) -> Results:
    """`norm`."""
    return _norm(body, call)


def norm_quantize(call: Call, body: Body) -> Results:
    """`norm_quantize`."""
    total, y = _norm(body, call)
    return (total, y, *_quantize_activation(body, call, y))


def attention(call: Call, body: Body) -> Results:
    """`attention`."""
    at = call.attributes
    heads, kv_heads, softcap = at["heads"], at["kv_heads"], at["softcap"]

    def chosen(name: str, count: int) -> ir.Value:
        start, x = at[f"{name}_start"], call[name]
        return x if start == 0 and call.size(name, 2) == count else body.slice(x, start, start + count, 2)

    def repeated(x: ir.Value, middle: int) -> ir.Value:
        if kv_heads == heads:
            return x
        wide = body("Expand", body("Unsqueeze", x, body.ints(2)), body.ints(1, 1, heads // kv_heads, 1, 1))
        sizes = (0, heads, middle, -1) if middle != -1 else (0, heads, -1, call.size("v", 3))
        return body.reshape(wide, *sizes)

    queries = body.transpose(chosen("q", heads), 0, 2, 1, 3)
    keys = repeated(body.transpose(chosen("k", kv_heads), 0, 2, 3, 1), call.size("k", 3))
    values = repeated(body.transpose(chosen("v", kv_heads), 0, 2, 1, 3), -1)
    logits = body("Mul", body("MatMul", queries, keys), body.real(at["scale"]))
    if softcap > 0:
        cap = body.real(softcap)
        logits = body("Mul", body("Tanh", body("Div", logits, cap)), cap)
    infinite = body.real(-math.inf)
    mask = call.get("mask")
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        logits = body("Where", mask, logits, infinite)
    elif mask is not None:
        logits = body("Add", logits, mask)
    if at["causal"]:
        zero, one = (body.constant(np.array(v, dtype=np.int64)) for v in (0, 1))
        rows, columns = (
            body("Range", zero, body("Squeeze", body("Shape", call[name], start=1, end=2)), one)
            for name in ("q", "k")
        )
        visible = body("LessOrEqual", columns, body("Unsqueeze", rows, body.ints(1)))
        logits = body("Where", visible, logits, infinite)
    if mask is None:
        weights = body("Softmax", logits, axis=-1)
    else:  # only a mask can hide all keys from a query; such a row is 0 instead of NaN
        blind = body("Equal", body("ReduceMax", logits, body.ints(-1), keepdims=1), infinite)
        weights = body("Softmax", body("Where", blind, body.real(0.0), logits), axis=-1)
        weights = body("Where", blind, body.real(0.0), weights)
    return (body.transpose(body("MatMul", weights, values), 0, 2, 1, 3),)


def quantize_cache(call: Call, body: Body) -> Results:
    """`quantize_cache`."""
    bits = call.attributes["bits"]
    rounding = {"align": 32, "bits": bits, "hadamard": call.attributes["hadamard"]}
    given = {"x": call["x"], "params": None, "shift": call.get("shift"), "scale": None}
    lead, group = [0] * (call.rank("x") - 1), call.attributes["group"]
    depth = call.size("x", -1)
    if group:  # a group is a row of its own
        rows = body.reshape(call["x"], *lead, depth // group, group)
        rows.shape = ir.Shape([*[None] * (len(lead) + 1), group])
        rows.type = ir.TensorType(ir.DataType.FLOAT)
        given["x"] = rows
    u, params = quantize_activation(Call(given, rounding), body)
    if group:
        u, params = body.reshape(u, *lead, depth), body.reshape(params, *lead, 2 * (depth // group))
    if bits == 8:
        return u, params
    blocks = body.reshape(u, *lead, -1, 2, 16)
    low, high = (
        body("Gather", blocks, body.constant(np.array(i, dtype=np.int64)), axis=len(lead) + 1) for i in (0, 1)
    )
    both = body("BitwiseOr", low, body("BitShift", high, _byte(body, 4), direction="LEFT"))
    return body.reshape(both, *lead, ceil_to(depth, 32) // 2), params


def dequantize_cache(call: Call, body: Body) -> Results:
    """`dequantize_cache`."""
    depth, bits, group = (call.attributes[name] for name in ("depth", "bits", "group"))
    return (_cached(body, call["codes"], call["params"], call.rank("codes"), depth, bits, group),)


def _cached(
    body: Body, codes: ir.Value, params: ir.Value, rank: int, depth: int, bits: int, group: int
) -> ir.Value:
    if bits == 4:
        lead = [0] * (rank - 1)
        blocks = body.reshape(codes, *lead, -1, 16)
        both = body.stack([_field(body, blocks, low, 4) for low in (0, 4)], rank)
        codes = body.reshape(both, *lead, ceil_to(depth, 32))
    u = body.floats(body.slice(codes, 0, depth, -1))
    lead = [0] * (rank - 1)
    if group:
        u, params = (body.reshape(y, *lead, depth // group, n) for y, n in ((u, group), (params, 2)))
    scale, zero = (body.slice(params, i, i + 1, -1) for i in (0, 1))
    x = body("Mul", body("Sub", u, zero), scale)
    return body.reshape(x, *lead, depth) if group else x


def attention_cached(call: Call, body: Body) -> Results:
    """`attention_cached`: the body of `attention` on decoded keys and values."""
    at = dict(call.attributes)
    depth, width, bits, group = (at.pop(name) for name in ("depth", "value_depth", "bits", "group"))
    read = {}
    for name, size in (("k", depth), ("v", width)):
        decoded = _cached(body, call[name], call[f"{name}_params"], 4, size, bits, group)
        moved = body.transpose(decoded, 0, 2, 1, 3)
        moved.shape = ir.Shape([None, None, at["kv_heads"], size])
        moved.type = ir.TensorType(ir.DataType.FLOAT)
        read[name] = moved
    inputs = {"q": call["q"], **read, "mask": call.get("mask")}
    return attention(Call(inputs, {**at, "k_start": 0, "v_start": 0}), body)


def rotary(call: Call, body: Body) -> Results:
    """`rotary`."""
    x, at = call["x"], call.attributes
    axis, depth, width = at["head_dim_index"], call.size("x", 3), call.size("cos", 3)
    total = call.size("x", axis)
    heads = total if at["heads"] < 0 else at["heads"]
    turned = x if heads == total else body.slice(x, 0, heads, axis)
    part = turned if width == depth else body.slice(turned, 0, width, 3)
    if at["interleaved"]:
        odd, even = (body.slice(part, start, width, 3, step=2) for start in (1, 0))
        half = body.reshape(body.stack([body("Neg", odd), even], 4), 0, 0, 0, width)
    else:
        first, second = body.slice(part, 0, width // 2, 3), body.slice(part, width // 2, width, 3)
        half = body("Concat", body("Neg", second), first, axis=3)
    y = body("Add", body("Mul", part, call["cos"]), body("Mul", half, call["sin"]))
    if width != depth:
        y = body("Concat", y, body.slice(turned, width, depth, 3), axis=3)
    if heads != total:
        y = body("Concat", y, body.slice(x, heads, total, axis), axis=axis)
    return (y,)


def gated(call: Call, body: Body) -> Results:
    """`gated`."""
    return (body("Mul", _activate(body, call["gate"], call.attributes["activation"]), call["up"]),)


def _hadamard(body: Body, x: ir.Value, orders: Sequence[int], transpose: bool) -> ir.Value:
    """One small matrix product for each factor; the scale is in the first."""
    factors, inner = steps(orders), math.prod(orders)
    scale = inner**-0.5
    y = x
    for order in factors:
        inner //= order
        matrix = (signs(order) * scale).astype(np.float32)
        matrix = matrix.T if transpose else matrix
        scale = 1.0
        if inner == 1:
            y = body("MatMul", body.reshape(y, -1, order), body.constant(np.ascontiguousarray(matrix)))
        else:
            left = body.constant(np.ascontiguousarray(matrix.T))
            y = body("MatMul", left, body.reshape(y, -1, order, inner))
    return body("Reshape", y, body("Shape", x)) if factors else body("Identity", x)


def hadamard(call: Call, body: Body) -> Results:
    """`hadamard`."""
    return (_hadamard(body, call["x"], call.attributes["orders"], bool(call.attributes["transpose"])),)


def quantize_dequantize(call: Call, body: Body) -> Results:
    """`quantize_dequantize`."""
    axes = [-1] if call.attributes["granularity"] == "token" else range(1, call.rank("x"))
    codes, scale, offset = _quantize(body, call["x"], call.get("params"), axes, call.attributes["bits"])
    return (body("Mul", body("Sub", codes, offset), scale),)


def _one_above_the_other(body: Body, call: Call, name: str) -> ir.Value | None:
    """An input `[E, N, ...]` that may be absent as `[E N, ...]`."""
    held = call.get(name)
    if held is None:
        return None
    rows, last = call.size(name, 0) * call.size(name, 1), call.size(name, 2)
    flat = body.reshape(held, rows, last)
    flat.shape, flat.type = ir.Shape([rows, last]), held.type
    return flat


def dequantize_weight(call: Call, body: Body) -> Results:
    """`dequantize_weight`: ONNX's own DequantizeLinear, in blocks where there are groups, unless zero points are not
    whole; matrices of several experts are one above the other."""
    if call.rank("scale") == 3:
        stacked = {name: _one_above_the_other(body, call, name) for name in ("codes", "scale", "zero")}
        (matrix,) = dequantize_weight(Call(stacked, call.attributes), body)
        return (body.reshape(matrix, *(call.size("codes", axis) for axis in range(3))),)
    codes, scale, zero, group = call["codes"], call["scale"], call.get("zero"), call.attributes["group_size"]
    if zero is not None and zero.dtype == ir.DataType.FLOAT:
        rows, width = (call.size("codes", axis) for axis in (0, 1))
        spread = [
            body.slice(body.reshape(body("Expand", body("Unsqueeze", v, body.ints(-1)), body.ints(1, 1, group)),
                                    rows, call.size(name, 1) * group), 0, width, 1)
            for name, v in (("zero", zero), ("scale", scale))
        ]  # fmt: skip
        return (body("Mul", body("Sub", body.floats(codes), spread[0]), spread[1]),)
    if group:
        return (body("DequantizeLinear", codes, scale, zero, axis=1, block_size=group),)
    flat = [None if v is None else body.reshape(v, call.size("codes", 0)) for v in (scale, zero)]
    return (body("DequantizeLinear", codes, *flat, axis=0),)


def dequantize_outliers(call: Call, body: Body) -> Results:
    """`dequantize_outliers`."""
    (dense,) = dequantize_weight(call, body)
    values = body.floats(call["values"])
    if call.attributes["multiplier"] != 1.0:
        values = body("Mul", values, body.real(call.attributes["multiplier"]))
    places = body.cast(call["places"], ir.DataType.INT64)
    return (body("ScatterElements", dense, places, values, axis=1, reduction="add"),)


BODIES: dict[str, Builder] = {
    function.__name__: function
    for function in (
        attention,
        attention_cached,
        conv_packed,
        dequantize_cache,
        dequantize_codebook,
        dequantize_coded,
        dequantize_outliers,
        dequantize_weight,
        embedding_packed,
        gated,
        hadamard,
        linear_codebook,
        linear_coded,
        linear_dense,
        linear_fp8,
        linear_grouped,
        linear_grouped_dense,
        linear_grouped_packed,
        linear_grouped_packed_float,
        linear_outliers,
        linear_outliers_float,
        linear_packed,
        linear_packed_float,
        linear_sparse,
        linear_sparse_float,
        norm,
        norm_quantize,
        quantize_activation,
        quantize_activation_fp8,
        quantize_cache,
        quantize_dequantize,
        quantize_dequantize_fp8,
        quantize_linear_packed,
        rotary,
    )
}
"""Operator name → builder of its body."""


def build_function(
    name: str, inputs: Mapping[str, ir.Value | None], attributes: Sequence[ir.Attr]
) -> ir.Function:
    """The function for one use of the dialect operator `name`.

    inputs: the node's actual inputs by argument name, None where absent; only their dtypes and shapes are read.
    """
    if name not in BODIES:
        raise UnsupportedError(
            "No ONNX lowering for a dialect operator",
            got=f"isofold::{name}",
            expected=" | ".join(sorted(BODIES)),
        )
    formal = {
        argument: ir.Value(
            name=argument, type=actual.type if actual else None, shape=actual.shape if actual else None
        )
        for argument, actual in inputs.items()
    }
    present = {
        argument: formal[argument] if actual is not None else None for argument, actual in inputs.items()
    }
    body = Body()
    results = BODIES[name](Call(present, {a.name: a.value for a in attributes}), body)
    for index, result in enumerate(results):
        result.name = f"result_{index}"
    return body.function(ONNX_DOMAIN, OPERATORS[name].onnx_name, list(formal.values()), results, attributes)
