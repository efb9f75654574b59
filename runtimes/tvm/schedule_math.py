"""Transcendental functions of float32 as polynomials: LLVM turns one on a vector into a call of libm for each lane.

What importers write (`T.exp`, `T.tanh`, `T.sigmoid`, `T.erf`) becomes the expressions of `kernels/math.py`. Functions
that stand for one value a row at most (logarithms) or are computed once (sines of position tables) stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from ..kernels import math as fast

Expr = Any


def _erf(x: Expr) -> Expr:
    """2 Phi(sqrt(2) x) - 1, from the polynomial of `gelu`, which is z Phi(z)."""
    root = fast.splat(math.sqrt(2), x)

    def scaled(z: Expr) -> Expr:
        # gelu(z) = z Phi(z) is divided by z nowhere near 0; there the series of erf has one term that counts.
        small = tirx.Select(tirx.abs(z) < fast.splat(1e-3, z), fast.splat(1.0, z), z)
        from_gelu = fast.splat(2.0, z) * fast.gelu(small) / small - fast.splat(1.0, z)
        linear = z * fast.splat(math.sqrt(2 / math.pi), z)
        return tirx.Select(tirx.abs(z) < fast.splat(1e-3, z), linear, from_gelu)

    return fast.let(x * root, scaled)


_FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    "exp": fast.exp,
    "tanh": fast.tanh,
    "sigmoid": fast.sigmoid,
    "erf": _erf,
}


def with_fast_math(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with polynomials for what LLVM has no vector form of."""

    def replaced(call: Any) -> Any:
        polynomial = _FUNCTIONS.get(str(getattr(call.op, "name", "")).rpartition(".")[2])
        if polynomial is None or str(call.ty.dtype) != "float32":
            return call
        return polynomial(call.args[0])

    return tvm_ffi.structural_map(function, (ir.Call, replaced))
