"""What the rules of elementwise operators share: broadcasting operands, casts to the type that torch computes in.

Transcendental functions are TVM's intrinsics here; the schedule makes polynomials of them (`schedule_math.py`), once
nothing is inlined any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from tvm import te, tirx

from ..builder import Builder, Kernel, dtype_name, fake

Expr = Any
Unary = Callable[[Expr], Expr]
Binary = Callable[[Expr, Expr], Expr]


def constant(value: Any, dtype: str) -> Expr:
    """A Python number as a TIR constant of a type (booleans and infinities too)."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    if dtype.startswith(("int", "uint")):
        return tirx.const(int(value), dtype)
    return tirx.const(float(value), dtype)


def equal(x: Expr, number: Any) -> Expr:
    """Whether an expression is a number (an int or another expression)."""
    return tirx.EQ(x, constant(number, str(x.ty.dtype)) if isinstance(number, (int, float)) else number)


def cast(x: Expr, dtype: str) -> Expr:
    """`x` as torch converts it: to bool means "not zero"."""
    own = str(x.ty.dtype)
    if own == dtype:
        return x
    if dtype == "bool":
        return tirx.NE(x, constant(0, own))
    return x.astype(dtype)


def read(k: Kernel, operand: Any, indices: tuple[Expr, ...], dtype: str) -> Expr:
    """An operand (tensor node, number or size) at broadcast indices, in a type."""
    if isinstance(operand, fx.Node):
        return cast(k.at(k.tensor(operand), indices, k.result), dtype)
    if isinstance(operand, sympy.Expr):
        return cast(k.size(operand), dtype)
    return constant(operand, dtype)


def common_dtype(*operands: Any) -> torch.dtype:
    """The type torch computes in."""
    values = [
        fake(o) if isinstance(o, fx.Node) else (1 if isinstance(o, sympy.Expr) else o) for o in operands
    ]
    result = values[0]
    if len(values) == 1:
        return result.dtype if isinstance(result, torch.Tensor) else torch.get_default_dtype()
    dtype = torch.result_type(values[0], values[1])
    for other in values[2:]:
        dtype = torch.promote_types(dtype, torch.result_type(values[0], other))
    return dtype


def pointwise(b: Builder, node: fx.Node, operands: list[Any], dtype: str, body: Callable[..., Expr]) -> Any:
    """Emit `body` of the operands' elements in `dtype`; the result is cast to the node's type."""
    result = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        def element(*indices: Expr) -> Expr:
            return cast(body(*(read(k, o, indices, dtype) for o in operands)), result)

        for operand in operands:
            if isinstance(operand, fx.Node):
                k.tensor(operand)
        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)
