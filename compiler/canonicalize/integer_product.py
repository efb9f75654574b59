"""Products of codes and weights: zero points and scales of rows stand in front of the linear.

    linear(u, W) - z rowsum(W)  → linear(u - z, W)       z a number, or one for each row of u
    linear(u, W) s              → linear(u s, W)         s one for each row of u

Kernels that multiply integers take the zero point and the scale out of the sum, where they cost one operation for each
output. Over the reals both are linear in u, and in front of the linear they say what the input is: a rounded activation
`(u - z) s`, as those models write that simulate the rounding.

Side conditions: u is whole by `integer_values.Bounds` (other linears keep their order); W is constant, and what is
subtracted is its row sums exactly (constants are those of integers, so they are equal or not); the linear has no other
reader and, for scales, no bias. Exactness: real.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import argument, only_user, shape
from ..passes import Guarantee, define_pass
from .integer_values import Bounds
from .match import (
    ADDITIONS,
    MULTIPLICATIONS,
    SUBTRACTIONS,
    aten,
    either_order,
    equal_sizes,
    is_call,
    operands,
    scalar,
    vector,
)


@define_pass(Guarantee.REAL)
def canonicalize_integer_products(editor: Editor) -> None:
    """See the module."""
    bounds = Bounds(editor)
    for linear in editor.calls(aten.linear.default):
        codes, weight = operands(linear)[:2]
        matrix = editor.tensor(weight)
        if matrix is None or not bounds.is_whole(codes):
            continue
        sums = matrix.detach().double().sum(1)
        moved: fx.Node | None = linear
        while moved is not None:
            moved = _step(editor, moved, sums)


def _step(editor: Editor, linear: fx.Node, sums: Tensor) -> fx.Node | None:
    """One shift or scale moved in front; the new linear, or None."""
    x, weight = operands(linear)[:2]
    bias = argument(linear, "bias")
    size = int(sums.numel())
    if bias is not None:
        held = vector(editor, bias, size)
        shift = None if held is None else _multiple(held, sums)
        if shift is None:
            return None
        editor.applied(
            linear, f"its bias is {shift:g} times the row sums of its weight: the input is shifted"
        )
        new = editor.call(aten.linear.default, _shifted(editor, x, shift, linear), weight, like=linear)
        editor.replace(linear, new)
        return new
    user = only_user(linear)
    if user is None:
        return None
    if is_call(user, *ADDITIONS, *SUBTRACTIONS) and argument(user, "alpha") == 1:
        return _move_shift(editor, linear, user, sums)
    if is_call(user, *MULTIPLICATIONS):
        return _move_scale(editor, linear, user)
    return None


def _move_shift(editor: Editor, linear: fx.Node, user: fx.Node, sums: Tensor) -> fx.Node | None:
    subtracted = is_call(user, *SUBTRACTIONS)
    x, weight = operands(linear)[:2]
    for left, right in either_order(user):
        if left is not linear or (subtracted and operands(user)[0] is not linear):
            continue
        sign = -1.0 if subtracted else 1.0
        held = vector(editor, right, sums.numel())
        if held is not None:
            shift = _multiple(held, sums)
            moved = None if shift is None else _shifted(editor, x, sign * shift, linear)
        else:
            moved = _row_shifted(editor, x, right, sums, sign, user)
        if moved is None:
            return None
        editor.applied(linear, "a zero point behind it, times the row sums of its weight, is in front of it")
        new = editor.call(aten.linear.default, moved, weight, like=linear, before=user)
        editor.replace(user, new)
        return new
    return None


def _row_shifted(
    editor: Editor, x: fx.Node, right: object, sums: Tensor, sign: float, user: fx.Node
) -> fx.Node | None:
    """x + sign z where right is z times the row sums, one z for each row of x."""
    if not is_call(right, *MULTIPLICATIONS):
        return None
    for zero, factor in either_order(right):
        held = vector(editor, factor, sums.numel())
        multiple = None if held is None else _multiple(held, sums)
        if multiple is None or not _is_for_rows(zero, x):
            continue
        target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
        if abs(multiple) != 1.0:
            zero = editor.call(aten.mul.Tensor, zero, multiple, like=user)
        elif multiple < 0:
            target = aten.sub.Tensor if sign > 0 else aten.add.Tensor
        return editor.call(target, x, zero, like=user)
    return None


def _move_scale(editor: Editor, linear: fx.Node, user: fx.Node) -> fx.Node | None:
    x, weight = operands(linear)[:2]
    for left, right in either_order(user):
        if left is linear and _is_for_rows(right, x):
            editor.applied(linear, "the scale of each row is in front of it")
            scaled = editor.call(aten.mul.Tensor, x, right, like=user)
            new = editor.call(aten.linear.default, scaled, weight, like=linear, before=user)
            editor.replace(user, new)
            return new
    return None


def _is_for_rows(factor: object, x: fx.Node) -> bool:
    """Whether a value is computed for each row of x: the same sizes, and one in the last dimension."""
    sizes, rows = shape(factor) if isinstance(factor, fx.Node) else None, shape(x)
    if not sizes or not rows or len(sizes) != len(rows) or sizes[-1] != 1:
        return False
    return all(equal_sizes(a, b) or a == 1 for a, b in zip(sizes[:-1], rows[:-1], strict=True))


def _shifted(editor: Editor, x: fx.Node, shift: float, like: fx.Node) -> fx.Node:
    """x + shift, where x may be a sum with a number itself."""
    if is_call(x, *ADDITIONS, *SUBTRACTIONS) and argument(x, "alpha") == 1:
        number = scalar(editor, operands(x)[1])
        if number is not None and isinstance(operands(x)[0], fx.Node):
            x, shift = operands(x)[0], shift + (number if is_call(x, *ADDITIONS) else -number)
    return x if shift == 0 else editor.call(aten.add.Tensor, x, shift, like=like)


def _multiple(held: Tensor, sums: Tensor) -> float | None:
    """z where held is z times the row sums, and z is not 0."""
    largest = int(sums.abs().argmax())
    if not sums[largest]:
        return None
    wanted = held.detach().double()
    factor = float(wanted[largest] / sums[largest])
    return factor if factor and torch.equal(wanted, factor * sums) else None
