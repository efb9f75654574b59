"""Rows that choose their matrix as a loop of standard ONNX operators over the experts that are chosen.

A turn decodes the matrix of one expert, takes the rows that chose it and puts their products in place; experts that no
row chose cost nothing, and no more than one decoded matrix is held.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .body import Body

Matrix = Callable[[Body, Callable[[ir.Value], ir.Value]], ir.Value]
"""Decodes one expert's matrix `[n, K]` in a body, given what takes the expert's part of a tensor `[E, ...]`."""


def grouped(
    body: Body, x: ir.Value, expert: ir.Value, experts: int, n: int, matrix: Matrix, bias: ir.Value | None
) -> ir.Value:
    """x `[S, K]`, expert `[S]`, bias `[E, n]` → `[S, n]`; rows without one of the `experts` are 0."""
    known = body(
        "And", body("GreaterOrEqual", expert, body.integer(0)), body("Less", expert, body.integer(experts))
    )
    chosen = body("Unique", body("Compress", expert, known))
    rows = body("Shape", x, start=0, end=1)
    nothing = body("Expand", body.real(0.0), body("Concat", rows, body.ints(n), axis=0))

    def step(inner: Body, turn: ir.Value, before: ir.Value) -> ir.Value:
        e = inner("Gather", chosen, turn, axis=0)
        own = inner.reshape(inner("NonZero", inner("Equal", expert, e)), -1)
        weight = matrix(inner, lambda tensor: inner("Gather", tensor, e, axis=0))
        y = inner("MatMul", inner("Gather", x, own, axis=0), inner.transpose(weight, 1, 0))
        if bias is not None:
            y = inner("Add", y, inner("Gather", bias, e, axis=0))
        return inner("ScatterND", before, inner("Unsqueeze", own, inner.ints(1)), y)

    return body.loop(body("Size", chosen), nothing, step)
