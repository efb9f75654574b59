"""A constant factor for each output of a linear becomes part of its weight.

    c (x W^T + b)  =  x (diag(c) W)^T + c b        c: a number, or a vector over the outputs

Layer scale, the scale of LoRA, query scales that no attention took, and the scales that weight-only quantization
multiplies in behind a product with integer codes are all written so.

Side conditions: weight, bias and factor are finite constants; nothing else reads the linear (it would be computed
twice) or the weight (it would be stored twice); the factor is not the step of a rounding behind it, which says how the
value is quantized. Computed in float64, rounded once. Exactness: real.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import argument, only_user, shape
from ..passes import Guarantee, define_pass
from .match import (
    ADDITIONS,
    DIVISIONS,
    MULTIPLICATIONS,
    aten,
    either_order,
    is_call,
    operands,
    scalar,
    vector,
)


@define_pass(Guarantee.REAL)
def fold_output_scale(editor: Editor) -> None:
    """See the module."""
    for linear in editor.calls(aten.linear.default):
        product = only_user(linear)
        factor = _factor(editor, product, linear) if product is not None else None
        if product is None or factor is None:
            continue
        if _is_step(product):
            continue
        reason = _reason_against(editor, linear)
        if reason is not None:
            editor.refused(product, reason)
            continue
        _, weight, bias = (argument(linear, name) for name in ("input", "weight", "bias"))
        rows = _scaled(editor, weight, factor.reshape(-1, 1))
        shift = None if bias is None else _scaled(editor, bias, factor)
        new = editor.call(aten.linear.default, operands(linear)[0], rows, shift, like=linear, before=product)
        editor.applied(product, "a constant factor of a linear's outputs is part of its weight")
        editor.replace(product, new)


def _factor(editor: Editor, product: fx.Node, linear: fx.Node) -> Tensor | None:
    """What each output is multiplied with, float64 `[N]` or `[1]`; None where that is no finite constant."""
    if shape(product) is None or len(shape(product) or ()) != len(shape(linear) or ()):
        return None
    found = None
    if is_call(product, *MULTIPLICATIONS):
        other = next((right for left, right in either_order(product) if left is linear), None)
        found = _constant(editor, other, linear)
    elif is_call(product, *DIVISIONS) and operands(product)[0] is linear:
        divisor = _constant(editor, operands(product)[1], linear)
        found = None if divisor is None else 1.0 / divisor
    return found if found is not None and bool(torch.isfinite(found).all()) else None


def _constant(editor: Editor, operand: object, linear: fx.Node) -> Tensor | None:
    number = scalar(editor, operand)
    if number is not None:
        return torch.tensor([number], dtype=torch.float64)
    held = vector(editor, operand, (shape(linear) or (0,))[-1])
    return None if held is None else held.to(torch.float64)


def _is_step(product: fx.Node) -> bool:
    """Whether what is multiplied is rounded, at once or after a zero point was added."""
    readers = [
        user for node in product.users for user in ([node] if not is_call(node, *ADDITIONS) else node.users)
    ]
    return any(is_call(user, aten.round.default) for user in readers)


def _reason_against(editor: Editor, linear: fx.Node) -> str | None:
    weight, bias = argument(linear, "weight"), argument(linear, "bias")
    held = editor.tensor(weight)
    if held is None or not held.is_floating_point() or (bias is not None and editor.tensor(bias) is None):
        return "the weight or the bias of the linear is computed by the model"
    if only_user(weight) is not linear:
        return "the weight of the linear has other readers, so a scaled copy would be stored beside it"
    return None


def _scaled(editor: Editor, node: fx.Node, factor: Tensor) -> fx.Node:
    held = editor.tensor(node)
    assert held is not None
    return editor.constant((held.to(torch.float64) * factor).to(held.dtype), f"{editor.name_of(node)}_scaled")
