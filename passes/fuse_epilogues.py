"""What follows a packed linear element by element becomes its epilogue, so that its result is written once.

    activation(linear(x))       → linear(x, activation)         relu, gelu (erf and tanh), silu; convolutions, dense and
                                                                sparse float linears too
    linear(x) + c               → the bias                      c a constant vector
    c linear(x)                 → the scales, sums and bias     c a number or a constant vector
    linear(x) + r               → linear(x, residual = r)       r of the same shape

The operator's order is product, bias, activation, residual, so each rule asks that nothing later is taken yet. Of two
linears that are added, the later one takes the other's result.

Side conditions: nothing else reads the linear's result. A residual has exactly the linear's shape (no broadcast) and
the sum alpha = 1. Group scales are float16 and take only powers of two, through their multiplier.

Exactness: REAL; biases and scales are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import MULTIPLICATIONS, equal_shapes, is_call, scalar, vector
from ..compiler.dialect import conv_packed, linear_dense, linear_sparse_float
from ..compiler.editor import Editor
from ..compiler.graph import argument, only_user, shape
from ..compiler.passes import Guarantee, define_pass
from .packed_rows import LINEARS, PackedRows, arguments, call_with, is_plain, read_rows, write_rows

aten = torch.ops.aten
ACTIVATIONS = (aten.relu.default, aten.gelu.default, aten.silu.default)
"""Operators that an epilogue may become."""


@define_pass(Guarantee.REAL)
def fuse_epilogues(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(
        *LINEARS, conv_packed.overload, linear_dense.overload, linear_sparse_float.overload
    ):
        current: fx.Node | None = node
        while current is not None:
            current = _absorb_next(editor, current)
    for node in editor.calls(aten.add.Tensor):
        _absorb_sum(editor, node)


def _activation(node: fx.Node) -> str | None:
    if node.target == aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(node, "approximate"))
    return "relu" if node.target == aten.relu.default else "silu"


def _absorb_next(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Take what follows into the operator; the new call, or None where nothing was taken."""
    linear = is_call(node, *LINEARS)
    user = only_user(node)
    if user is None:
        following = next((u for u in node.users if is_call(u, *ACTIVATIONS)), None)
        if following is not None:
            editor.refused(following, f"{len(node.users)} operators read the value before the activation")
        return None
    whole = is_call(node, conv_packed.overload)
    if not (argument(node, "activation") == "none" if whole else is_plain(node)):
        return None
    if is_call(user, *ACTIVATIONS):
        name = _activation(user)
        assert name is not None
        new = call_with(editor, node, before=user, activation=name)
        editor.applied(new, f"{name} as an epilogue")
    elif linear and is_call(user, *MULTIPLICATIONS, aten.add.Tensor):
        changed = _with_constant(editor, node, user)
        if changed is None:
            return None
        new, what = changed
        editor.applied(new, what)
    else:
        return None
    editor.replace(user, new)
    return new


def _with_constant(editor: Editor, node: fx.Node, user: fx.Node) -> tuple[fx.Node, str] | None:
    """The linear with a constant of the product or sum that reads it."""
    other = user.args[1] if user.args[0] is node else user.args[0]
    given = arguments(node)
    number, along = scalar(editor, other), vector(editor, other, given["n"])
    constant = torch.tensor(number, dtype=torch.float64) if number is not None else along
    rows = read_rows(editor, node)
    if constant is None or rows is None or not equal_shapes(user, node):
        return None
    if is_call(user, aten.add.Tensor):
        sign = argument(user, "alpha") if other is user.args[1] else 1
        if user.args[0] is not node and argument(user, "alpha") != 1:
            return None
        old = 0.0 if rows.bias is None else rows.bias.double()
        bias = (old + sign * constant.double()).float().expand(given["n"])
        name = f"{node.name}_bias" if rows.bias is None else f"{editor.name_of(given['bias'])}_sum"
        return call_with(editor, node, before=user, bias=editor.constant(bias, name)), "constant in the bias"
    scaled = _scaled(rows, constant, given.get("group_size", 0))
    if isinstance(scaled, str):
        editor.refused(user, scaled)
        return None
    changes = write_rows(editor, [node], scaled)
    # The codes are the same bytes: keep the one constant that holds them.
    weight = given["weight"]
    return call_with(editor, node, before=user, **{**changes, "weight": weight}), "factor in the scales"


def _scaled(rows: PackedRows, factor: Tensor, group_size: int) -> PackedRows | str:
    """Rows times a number or one number each."""

    def times(t: Tensor | None) -> Tensor | None:
        return None if t is None else (t.double() * factor).float()

    sums: dict[str, Any] = {"wsum": times(rows.wsum), "bias": times(rows.bias)}
    power_of_two = not factor.dim() and math.frexp(float(factor))[0] == 0.5
    if rows.values is not None and not power_of_two:
        return "outliers are float16 and take only a power of two"
    outliers = rows.outlier_multiplier * (float(factor) if power_of_two else 1.0)
    if group_size == 0:
        scale = (rows.scale.double() * factor.reshape(-1, 1)).float()
        return replace(rows, scale=scale, outlier_multiplier=outliers, **sums)
    if not power_of_two:
        return "group scales are float16 and take only a power of two"
    return replace(rows, multiplier=rows.multiplier * float(factor), outlier_multiplier=outliers, **sums)


def _absorb_sum(editor: Editor, node: fx.Node) -> None:
    operands: list[Any] = list(node.args[:2])
    linears = [x for x in operands if is_call(x, *LINEARS) and arguments(x)["residual"] is None]
    if not linears or not all(isinstance(x, fx.Node) for x in operands):
        return
    linear = max((x for x in linears if only_user(x) is node), default=None)
    if linear is None:
        readers = len(linears[0].users)
        editor.refused(
            node, f"the linear's result is read by {readers} operators, so it is needed without the sum"
        )
        return
    residual = operands[1] if operands[0] is linear else operands[0]
    if residual is linear or argument(node, "alpha") != 1:
        editor.refused(node, "the sum is not of the linear and another value, each counted once")
    elif not equal_shapes(residual, linear):
        sizes = [[str(s) for s in shape(x) or ()] for x in (linear, residual)]
        editor.refused(node, f"the sum broadcasts {sizes[1]} to {sizes[0]}")
    else:
        new = call_with(editor, linear, before=node, residual=residual)
        editor.applied(new, "sum with the residual as an epilogue")
        editor.replace(node, new)
