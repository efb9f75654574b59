"""Plans of the linears on sparse weights, for all layouts.

| rows | kernels |
|---|---|
| up to 32 | `sparse.SparseRows`: the stored values stream past once |
| 16 and more of 2:4 | `sparse_gemm.SparseGemm`: sparse tensor cores |
| more of the others | `sparse.Densify`, then `gemm` |
"""

from __future__ import annotations

import math

import numpy as np

from . import sparse_gemm
from .builder import Tensor
from .convert import CastRows
from .epilogue import Linear
from .gemm import Gemm
from .linears import FEW_ROWS, add, add_choice, product_tile
from .plan import Call, Plan
from .sparse import Densify, SparseRows
from .sparse_encodings import Encoding
from .sparse_gemm import SparseGemm


def linear_sparse(call: Call) -> Plan:
    """`isofold.linear_sparse`."""
    plan, attributes = Plan(), call.attributes
    rows, width = plan.rows(call["u"]), int(call["u"].shape[-1])
    plan.view("u", rows, width)
    static = len(call["params"].shape) == 1
    plan.view("params", *((2,) if static else (rows, 2)))
    linear, encoding = _shared(plan, call)
    group_size, multiplier = attributes["group_size"], float(attributes["scale_multiplier"])
    few = SparseRows(linear, encoding, width, static, group_size, multiplier)
    dense = Densify(linear, encoding, group_size)
    if encoding.layout == sparse_gemm.LAYOUT and width % 8 == 0:
        sparse = SparseGemm(linear, encoding, width, static)
        if isinstance(rows, int):
            add(plan, few if rows <= sparse_gemm.FEW_ROWS else sparse)
        else:
            add_choice(plan, [(sparse_gemm.FEW_ROWS, few)], sparse)
        return plan
    # Activations of another width than the dense product's stay with the kernel for few rows.
    if (isinstance(rows, int) and rows <= FEW_ROWS) or width != dense.kp:
        add(plan, few)
        return plan
    if group_size:
        plan.constants["multiplier"] = np.array([multiplier], dtype=np.float32)
    add(plan, dense, rows, Tensor("u", (rows, width), "uint8"))
    many = Gemm(linear, dense.result, "codes", product_tile(linear, dense.result), static)
    if isinstance(rows, int):
        add(plan, many)
    else:
        add_choice(plan, [(FEW_ROWS, few)], many)
    return plan


def linear_sparse_float(call: Call) -> Plan:
    """`isofold.linear_sparse_float`."""
    plan = Plan()
    rows = plan.rows(call["x"])
    plan.view("x", rows, int(call["x"].shape[-1]))
    linear, encoding = _shared(plan, call)
    few, dense = SparseRows(linear, encoding, linear.k), Densify(linear, encoding)
    if isinstance(rows, int) and rows <= FEW_ROWS:
        add(plan, few)
        return plan
    plan.constants["ones"] = np.ones(linear.packed, dtype=np.float32)
    add(plan, dense, rows, Tensor("x", (rows, linear.k), "float32"))
    add(plan, CastRows(rows, linear.k, dense.kp, dense.result.layout.order), rows)
    many = Gemm(linear, dense.result, "float", product_tile(linear, dense.result))
    renamed = {"scale": "ones"}
    if isinstance(rows, int):
        add(plan, many, renamed=renamed)
    else:
        add_choice(plan, [(FEW_ROWS, few)], many, renamed)
    return plan


def _shared(plan: Plan, call: Call) -> tuple[Linear, Encoding]:
    attributes, first = call.attributes, call["u" if call.has("u") else "x"]
    linear = Linear(
        plan.rows(first), attributes["k"], attributes["n"], attributes["activation"], attributes["gated"],
        call.has("bias"), call.has("residual"),
    )  # fmt: skip
    names = ("places", "values", "offsets")
    plan.flat(call, *names, "scale", "wsum", "bias")
    if call.has("residual"):
        plan.view("residual", linear.rows, linear.n)
    plan.results = ("y",)
    places, values, offsets = (math.prod(int(s) for s in call[name].shape) for name in names)
    sizes = (places, values, offsets)
    return linear, Encoding(attributes["layout"], call["values"].dtype, linear.packed, linear.k, sizes)
