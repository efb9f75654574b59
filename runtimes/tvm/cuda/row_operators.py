"""Plans of the operators that one kernel of `rows.py` does: quantizers, norms, Hadamard transforms."""

from __future__ import annotations

import math
from typing import Any

from ....compiler.dialect.cache_packing import ALIGN, pair_count
from .builder import Tensor, get, prim_func
from .knobs import tuned
from .plan import Call, Plan, Stage
from .pointwise import add_pointwise
from .rows import Rows


def add_rows(plan: Plan, spec: Rows, renamed: dict[str, str] | None = None) -> None:
    """Append the kernel of `spec`; renamed: names of the plan for arguments of the kernel that are called otherwise."""
    spec, names = tuned(spec), renamed or {}
    plan.constants.update(spec.constants())
    function = prim_func(spec.name, [*spec.inputs(), *spec.outputs()], spec.emit)
    inputs = tuple(names.get(t.name, t.name) for t in spec.inputs())
    plan.stages.append(Stage(function, inputs, tuple(spec.outputs())))


def quantize_activation(call: Call) -> Plan:
    """`isofold.quantize_activation`."""
    plan = Plan()
    quantize_into(
        plan,
        call,
        "x",
        call["x"],
        call.attributes["align"],
        "params",
        "shift",
        "scale",
        call.attributes["bits"],
    )
    plan.results = ("u", "params")
    return plan


def quantize_activation_fp8(call: Call) -> Plan:
    """`isofold.quantize_activation_fp8`."""
    plan, k = Plan(), int(call["x"].shape[-1])
    rows = plan.rows(call["x"])
    plan.view("x", rows, k)
    plan.flat(call, "params", "shift", "scale")
    spec = Rows(
        rows, k, shift=call.has("shift"), scale=call.has("scale"), orders=tuple(call.attributes["hadamard"]),
        codes="static" if call.has("params") else "dynamic", fp8=True, align=call.attributes["align"],
    )  # fmt: skip
    add_rows(plan, spec, {"pair": "params"})
    plan.results = ("u", "params")
    return plan


def quantize_cache(call: Call) -> Plan:
    """`isofold.quantize_cache`: a row of the kernel is a group of a head."""
    plan, bits = Plan(), call.attributes["bits"]
    groups = pair_count(int(call["x"].shape[-1]), call.attributes["group"])
    quantize_into(plan, call, "x", call["x"], ALIGN, "", "shift", "", bits, bits == 4, groups)
    plan.results = ("u", "params")
    return plan


def quantize_into(
    plan: Plan,
    call: Call,
    x: str,
    operand: Any,
    align: int,
    params: str,
    shift: str,
    scale: str,
    bits: int,
    nibbles: bool = False,
    parts: int = 1,
) -> None:
    """Append a quantizer of argument `x` that writes `u`, and `params` where no static pair of this name is given.

    parts: of a row, each with a pair of its own.
    """
    k = int(operand.shape[-1]) // parts
    rows = plan.rows(operand, parts=parts)
    plan.view(x, rows, k)
    plan.flat(call, params, shift, scale)
    spec = Rows(
        rows, k, shift=call.has(shift), scale=call.has(scale), orders=tuple(call.attributes.get("hadamard") or ()),
        codes="static" if call.has(params) else "dynamic", bits=bits, align=align, nibbles=nibbles,
    )  # fmt: skip
    add_rows(plan, spec, {"pair": params, "shift": shift, "scale": scale, "x": x})


def norm(call: Call) -> Plan:
    """`isofold.norm`."""
    return _norm(call, quantize=False)


def norm_quantize(call: Call) -> Plan:
    """`isofold.norm_quantize`."""
    return _norm(call, quantize=True)


def _norm(call: Call, quantize: bool) -> Plan:
    plan, attributes = Plan(), call.attributes
    k = int(call["x"].shape[-1])
    rows = plan.rows(call["x"])
    for name in ("x", "residual"):
        if call.has(name):
            plan.view(name, rows, k)
    plan.flat(call, "weight", "bias", "params", "shift", "scale")
    residual = call.has("residual")
    spec = Rows(
        rows, k, norm=attributes["kind"], eps=float(attributes["eps"]), residual=residual, weight=call.has("weight"),
        bias=call.has("bias"), sum=residual and call.wants(0), y=call.wants(1),
        shift=quantize and call.has("shift"), scale=quantize and call.has("scale"),
        orders=tuple(attributes.get("hadamard") or ()) if quantize else (),
        codes=("static" if call.has("params") else "dynamic") if quantize else None,
        bits=attributes.get("bits", 8), align=attributes.get("align", 1),
    )  # fmt: skip
    add_rows(plan, spec, {"pair": "params"})
    first = "sum" if spec.sum else ("x" if not residual else None)
    plan.results = (first, "y" if spec.y else None, *(("u", "params") if quantize else ()))
    return plan


def hadamard(call: Call) -> Plan:
    """`isofold.hadamard`: a row of the kernel is a block of the transform."""
    plan = Plan()
    orders = tuple(order for order in call.attributes["orders"] if order > 1)
    operand = call["x"]
    if not orders:
        count = plan.rows(operand, keep=0)
        inputs = [Tensor(plan.view("x", count), (count,), "float32")]
        add_pointwise(plan, "copy", inputs, Tensor("y", (count,), "float32"), lambda k, i: get(k["x"], i))
        plan.results = ("y",)
        return plan
    block = math.prod(orders)
    n = int(operand.shape[-1])
    rows = plan.size("m", math.prod(operand.shape[:-1]) * (n // block))
    plan.view("x", rows, block)
    spec = Rows(rows, block, orders=orders, transpose=call.attributes["transpose"], transformed=True)
    add_rows(plan, spec)
    plan.results = ("transformed",)
    return plan
