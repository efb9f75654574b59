"""Plans of the linears on sparse weights."""

from __future__ import annotations

import numpy as np

from .builder import Size, Tensor
from .convert import CastRows
from .epilogue import Linear
from .gemm import Gemm
from .linears import FEW_ROWS, add, add_choice, product_tile
from .plan import Call, Plan
from .sparse import Densify, SparseRows


def linear_sparse(call: Call) -> Plan:
    """`isofold.linear_sparse`."""
    return _sparse(call, codes=True)


def linear_sparse_float(call: Call) -> Plan:
    """`isofold.linear_sparse_float`."""
    return _sparse(call, codes=False)


def refusal(call: Call) -> str | None:
    """Why a sparse linear has no GPU kernels: they read bitmasks of float32 values, or of int8 codes scaled by rows."""
    attributes = call.attributes
    if attributes["layout"] != "bitmask":
        return (
            f"sparse weights of the layout {attributes['layout']} (sparsity: {{layout: bitmask}} has kernels)"
        )
    if call["values"].dtype not in ("float32", "int8") or attributes.get("group_size"):
        return f"sparse weights with {call['values'].dtype} values or scales of groups"
    return None


def _sparse(call: Call, codes: bool) -> Plan:
    plan, attributes = Plan(), call.attributes
    first = call["u" if codes else "x"]
    rows, width = plan.rows(first), int(first.shape[-1])
    plan.view("u" if codes else "x", rows, width)
    linear = Linear(
        rows, attributes["k"], attributes["n"], attributes["activation"], attributes["gated"], call.has("bias"),
        call.has("residual"),
    )  # fmt: skip
    plan.flat(call, "values", "offsets", "scale", "wsum", "bias")
    plan.view("places", *(int(s) for s in call["places"].shape))
    static = codes and len(call["params"].shape) == 1
    if codes:
        plan.view("params", *((2,) if static else (rows, 2)))
    if call.has("residual"):
        plan.view("residual", rows, linear.n)
    count = int(call["values"].shape[0])
    plan.results = ("y",)
    few = SparseRows(linear, codes, width, count, static)
    dense = Densify(linear, codes, count)
    # Wider activations than the dense product reads (or odd ones) stay with the kernel for few rows.
    if (isinstance(rows, int) and rows <= FEW_ROWS) or (codes and width != dense.kp):
        add(plan, few)
        return plan
    if not codes:
        plan.constants["ones"] = np.ones(linear.packed, dtype=np.float32)
    _add_dense(plan, linear, dense, few, codes, rows, width, static)
    return plan


def _add_dense(
    plan: Plan,
    linear: Linear,
    dense: Densify,
    few: SparseRows,
    codes: bool,
    rows: Size,
    width: int,
    static: bool,
) -> None:
    witness = Tensor("u" if codes else "x", (rows, width), "uint8" if codes else "float32")
    add(plan, dense, rows, witness)
    if not codes:
        add(plan, CastRows(rows, linear.k, dense.kp, dense.result.layout.order), rows)
    many = Gemm(
        linear, dense.result, "codes" if codes else "float", product_tile(linear, dense.result), static
    )
    renamed = {} if codes else {"scale": "ones"}
    if isinstance(rows, int):
        add(plan, many, renamed=renamed)
    else:
        add_choice(plan, [(FEW_ROWS, few)], many, renamed)
