"""Plans of linears on packed weights: which kernels for how many rows.

| rows | kernels |
|---|---|
| up to 32 | `skinny`: the weights stream past once |
| more | `gemm`; before it `convert.CastRows` (float activations) and `convert.Expand` (layouts it does not read) |

Outliers beside the weights are part of `skinny`, and `outliers.SumOutliers` before `gemm`.

Where the number of rows is not known when compiling, all are in one function each and the host chooses when it
launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.element_formats import NF4, element_format
from ....compiler.dialect.packing import zero_steps
from .builder import Frame, Size, Tensor, prim_func, when
from .convert import CastRows, Expand
from .epilogue import Linear
from .gemm import GROUPED, LARGE, SMALL, Gemm, Tile
from .knobs import tuned
from .layouts import IntegerLayout, codebook_layout, coded_layout, fp8_layout, integer_layout
from .outliers import SumOutliers
from .plan import Call, Plan, Stage
from .row_operators import quantize_into
from .skinny import Skinny
from .weights import Activations, Weights

FEW_ROWS = 32
"""Rows up to which weights are better decoded for every 8 to 32 tokens than put into shared memory."""
FULL = 96
"""Blocks below which a product uses smaller tiles: about a wave of a large GPU."""


def linear_packed(call: Call) -> Plan:
    """`isofold.linear_packed`, and `isofold.linear_outliers`."""
    plan = Plan()
    rows = plan.rows(call["u"])
    weights = integer_weights(call)
    plan.view("u", rows, int(call["u"].shape[-1]))
    static = len(call["params"].shape) == 1
    plan.view("params", *((2,) if static else (rows, 2)))
    return _product(plan, call, rows, weights, "codes", static)


def quantize_linear_packed(call: Call) -> Plan:
    """`isofold.quantize_linear_packed`: the quantizer, then the linear."""
    plan = Plan()
    weights = integer_weights(call)
    align = max(32, weights.group_size)
    bits = call.attributes.get("input_bits", 8)
    quantize_into(plan, call, "x", call["x"], align, "params", "pre_shift", "pre_scale", bits)
    return _product(plan, call, plan.rows(call["x"]), weights, "codes", call.has("params"))


def linear_packed_float(call: Call) -> Plan:
    """`isofold.linear_packed_float`, and `isofold.linear_outliers_float`."""
    return _float_linear(call, integer_weights(call))


def linear_coded(call: Call) -> Plan:
    """`isofold.linear_coded`."""
    name, group_size = call.attributes["format"], call.attributes["group_size"]
    form = element_format(name)
    kind: Any = ("float16" if group_size else "float32") if form.scale == "float" else form.scale
    constants = {"table": np.array(NF4, dtype=np.float32)} if name == "nf4" else {}
    return _float_linear(call, Weights(coded_layout(name), group_size, kind), constants)


def linear_fp8(call: Call) -> Plan:
    """`isofold.linear_fp8`."""
    plan = Plan()
    name, group_size = call.attributes["format"], call.attributes["group_size"]
    kind: Any = {"float": "float16" if group_size else "float32"}.get(element_format(name).scale, "e8m0")
    rows, static = plan.rows(call["u"]), len(call["params"].shape) == 1
    plan.view("u", rows, int(call["u"].shape[-1]))
    plan.view("params", *((1,) if static else (rows, 1)))
    return _product(plan, call, rows, Weights(fp8_layout(name), group_size, kind), "fp8", static)


def linear_codebook(call: Call) -> Plan:
    """`isofold.linear_codebook`."""
    return _float_linear(call, Weights(codebook_layout(call.attributes["format"]), 0, "float32"))


def integer_weights(call: Call) -> Weights:
    """How the integer codes of a call are stored."""
    bits, group_size = call.attributes["bits"], call.attributes["group_size"]
    steps = zero_steps(bits) if call.has("zero") else 0
    return Weights(integer_layout(bits), group_size, "float16" if group_size else "float32", steps)


def _float_linear(call: Call, weights: Weights, constants: dict[str, Any] | None = None) -> Plan:
    plan = Plan()
    plan.constants.update(constants or {})
    rows = plan.rows(call["x"])
    plan.view("x", rows, int(call["x"].shape[-1]))
    return _product(plan, call, rows, weights, "float", False)


def _product(
    plan: Plan, call: Call, rows: Size, weights: Weights, activations: Activations, static: bool
) -> Plan:
    attributes = call.attributes
    linear = Linear(
        rows, attributes["k"], attributes["n"], attributes["activation"], attributes["gated"], call.has("bias"),
        call.has("residual"), int(call["places"].shape[0]) if call.has("places") else 0,
        float(attributes.get("outlier_multiplier", 1.0)),
    )  # fmt: skip
    plan.flat(call, "weight", "scale", "zero", "codebooks", "table", "wsum", "bias")
    if linear.outliers:
        plan.flat(call, "places", "values", "offsets")
    if call.has("residual"):
        plan.view("residual", rows, linear.n)
    if weights.group_size:
        plan.constants["multiplier"] = np.array([attributes["scale_multiplier"]], dtype=np.float32)
    add_product(plan, linear, weights, activations, static)
    plan.results = ("y",)
    return plan


def add_product(plan: Plan, linear: Linear, weights: Weights, activations: Activations, static: bool) -> None:
    """Append the kernels of a product to a plan."""
    rows = linear.rows
    few = [Skinny(linear, weights, activations, tiles, static) for tiles in (1, 2, 4)]
    if isinstance(rows, int) and rows <= FEW_ROWS:
        add(plan, next(s for s in few if rows <= 8 * s.tiles))
        return
    direct = isinstance(weights.layout, IntegerLayout) and weights.layout.bits in (8, 4)
    direct = direct or activations == "fp8"
    read = weights
    if not direct:
        expand = Expand(linear, weights, activations)
        read = expand.result
        k, kp = linear.k, weights.padded(linear.k)
        witness = (
            Tensor("u", (rows, kp), "uint8") if activations == "codes" else Tensor("x", (rows, k), "float32")
        )
        add(plan, expand, rows, witness)
    if activations == "float":
        add(plan, CastRows(rows, linear.k, weights.padded(linear.k), weights.layout.order), rows)
    if linear.outliers:
        width = weights.padded(linear.k) if activations == "codes" else linear.k
        add(plan, SumOutliers(linear, activations, width), rows)
    many = Gemm(linear, read, activations, product_tile(linear, read), static)
    if isinstance(rows, int):
        add(plan, many)
    else:
        add_choice(plan, [*((8 * s.tiles, s) for s in few)], many)


def product_tile(linear: Linear, weights: Weights) -> Tile:
    """The tile of a product of many rows."""
    large = GROUPED if weights.grouped or weights.zero else LARGE
    # Sequences of at least two tiles are taken for granted where their length is not known.
    rows = linear.rows if isinstance(linear.rows, int) else 256
    blocks = -(-linear.packed // large.features) * -(-rows // large.tokens)
    return large if blocks >= FULL else SMALL


def _inputs_and_outputs(kernel: Any) -> tuple[list[Tensor], list[Tensor]]:
    if hasattr(kernel, "inputs"):
        return kernel.inputs(), kernel.outputs()
    tensors = kernel.tensors()
    return tensors[:-1], tensors[-1:]


def add(
    plan: Plan,
    kernel: Any,
    beyond: Size = 0,
    witness: Tensor | None = None,
    renamed: dict[str, str] | None = None,
) -> None:
    """Append a kernel to a plan.

    beyond: a symbol of rows of which it is launched only where they are not few. witness: an argument that has that
    many rows, where the kernel itself reads none. renamed: names of the plan for arguments that are called otherwise.
    """
    kernel = tuned(kernel)
    inputs, outputs = _inputs_and_outputs(kernel)
    emit: Callable[[Frame], None] = kernel.emit
    tensors = [*inputs, *outputs]
    if isinstance(beyond, str):
        if witness is not None:
            tensors, inputs = [witness, *tensors], [witness, *inputs]

        def emit(frame: Frame) -> None:
            with when(frame.size(beyond) > FEW_ROWS):
                kernel.emit(frame)

    names = tuple((renamed or {}).get(t.name, t.name) for t in inputs)
    plan.stages.append(Stage(prim_func(kernel.name, tensors, emit), names, tuple(outputs)))


def add_choice(
    plan: Plan, few: Sequence[tuple[int, Any]], many: Any, renamed: dict[str, str] | None = None
) -> None:
    """Append one function that launches the kernel for the number of rows it finds."""
    few, many = [(limit, tuned(kernel)) for limit, kernel in few], tuned(many)
    inputs: dict[str, Tensor] = {}
    for kernel in (*(k for _, k in few), many):
        inputs.update({t.name: t for t in _inputs_and_outputs(kernel)[0]})
    outputs = _inputs_and_outputs(many)[1]

    def emit(frame: Frame) -> None:
        def choose(left: Sequence[tuple[int, Any]]) -> None:
            if not left:
                many.emit(frame)
                return
            limit, kernel = left[0]
            with T.If(frame.size(many.linear.rows) <= limit):
                with T.Then():
                    kernel.emit(frame)
                with T.Else():
                    choose(left[1:])

        choose(few)

    function = prim_func(f"linear_{many.name}", [*inputs.values(), *outputs], emit)
    names = tuple((renamed or {}).get(name, name) for name in inputs)
    plan.stages.append(Stage(function, names, tuple(outputs)))
