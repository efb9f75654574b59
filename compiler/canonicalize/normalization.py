"""The shared core of RMSNorm and LayerNorm: find `x / sqrt(mean(x^2) + eps)` over the last dimension.

Spellings: `x * rsqrt(m + eps)`, `x / sqrt(m + eps)`, `x * (m + eps) ** -0.5`, `x * reciprocal(sqrt(m + eps))`,
with the square as a power or a product, with or without casts to a wider type around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, only_user, shape
from .match import (
    ADDITIONS,
    DIVISIONS,
    MULTIPLICATIONS,
    aten,
    either_order,
    equal_shapes,
    is_call,
    is_last,
    operands,
    power,
    total,
    uncast,
    vector,
)

ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)


@dataclass
class Normalized:
    """`result` = `x` / sqrt(mean(x^2) + eps); `root` is the node of the root, for reports."""

    x: fx.Node
    eps: float
    root: fx.Node
    result: fx.Node


def find_normalized(editor: Editor) -> Iterator[Normalized | tuple[fx.Node, str]]:
    """All normalizations, and (node, reason) for those that are almost one."""
    for root in editor.calls(*ROOTS):
        if is_call(root, aten.pow.Tensor_Scalar) and operands(root)[1] not in (-0.5, 0.5):
            continue
        inside = mean_square(editor, operands(root)[0])
        if inside is None:
            continue
        x, mean, eps = inside
        dims = argument(mean, "dim")
        if not is_last(x, dims):
            yield root, f"it normalizes dimensions {dims} of {len(shape(x) or ())}, not the last one"
            continue
        if not argument(mean, "keepdim"):
            yield root, "its mean drops the normalized dimension, so the quotient broadcasts differently"
            continue
        if eps < 0:
            yield root, f"its epsilon {eps} is negative"
            continue
        result = _quotient(root, x)
        if result is None:
            yield root, "the root of the mean square does not just divide the value that it was computed from"
            continue
        yield Normalized(x, eps, root, result)


def mean_square(editor: Editor, node: object) -> tuple[fx.Node, fx.Node, float] | None:
    """(x, node of the mean, eps) where the node is mean(x^2) + eps."""
    if not isinstance(node, fx.Node):
        return None
    read = total(editor, node)
    if len(read.terms) != 1 or read.terms[0].coefficient != 1.0 or len(read.terms[0].factors) != 1:
        return None
    mean = read.terms[0].factors[0]
    if not is_call(mean, aten.mean.dim) or len(mean.users) != 1:
        return None
    squared = power(editor, operands(mean)[0])
    if squared is None or squared[1] != 2.0:
        return None
    return squared[0], mean, read.constant


def _quotient(root: fx.Node, x: fx.Node) -> fx.Node | None:
    """The node of x divided by the root."""
    inverse = is_call(root, aten.rsqrt.default) or (
        is_call(root, aten.pow.Tensor_Scalar) and operands(root)[1] == -0.5
    )
    user = only_user(root)
    if not inverse and is_call(user, aten.reciprocal.default):
        root, user, inverse = user, only_user(user), True
    wanted = MULTIPLICATIONS if inverse else DIVISIONS
    if not is_call(user, *wanted):
        return None
    orders = either_order(user) if inverse else iter([(operands(user)[0], operands(user)[1])])
    fits = any(b is root and (a is x or uncast(a) is uncast(x)) for a, b in orders)
    return user if fits and equal_shapes(user, x) and dtype(user) == dtype(x) else None


def narrowed(found: Normalized) -> tuple[fx.Node, fx.Node]:
    """(x, result) with the casts left out where the normalization is computed in a wider type and cast back."""
    before = uncast(found.x)
    after = only_user(found.result)
    if (
        before is not found.x
        and after is not None
        and uncast(after) is found.result
        and dtype(after) == dtype(before)
    ):
        return before, after
    return found.x, found.result


def affine(
    editor: Editor, result: fx.Node, size: int, with_bias: bool
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """Follow `result` through a product with a constant vector, then a sum with one: (last node, gain, bias)."""
    result, gain = _with_vector(editor, result, size, MULTIPLICATIONS)
    bias = None
    if with_bias:
        result, bias = _with_vector(editor, result, size, ADDITIONS)
    return result, gain, bias


def _with_vector(
    editor: Editor, result: fx.Node, size: int, targets: tuple[object, ...]
) -> tuple[fx.Node, fx.Node | None]:
    user = only_user(result)
    if not is_call(user, *targets) or (targets is ADDITIONS and argument(user, "alpha") != 1):
        return result, None
    for left, right in either_order(user):
        held = vector(editor, right, size) if left is result else None
        if held is None or held.dtype != dtype(result) or not equal_shapes(user, result):
            continue
        plain = editor.tensor(right)
        one_dimensional = plain is not None and plain.dim() == 1
        return user, right if one_dimensional else editor.constant(held, f"{editor.name_of(right)}_vector")
    return result, None
