"""Pointwise convolutions of what was channels last become linears.

    conv(permute(x, channels first), W[..., 1])          →  permute(linear(x, W), channels first)
    conv(act(permute(x, channels first)), W[..., 1])     →  permute(linear(act(x), W), channels first)

A convolution whose kernel has one element multiplies the channels of every position by one matrix. The permutation
moves from its input to its result, where it meets the one that turns the result back. Anchor: the convolution.

Side conditions: stride 1, no padding, one group, a constant weight; the input is a permutation of a value whose last
dimension are the channels, or functions of single elements, each with one reader, of that. A convolution of what
was channels first from the start stays one. Exactness: real (another order of one sum).
"""

from __future__ import annotations

from torch import fx

from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .match import aten, constant_matrix, is_call, operands, permutation

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_PERMUTATIONS = (aten.permute.default, aten.transpose.int)
_FUNCTIONS = (
    aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
    aten.leaky_relu.default, aten.elu.default, aten.hardswish.default, aten.mish.default, aten.dropout.default,
    aten.neg.default, aten.abs.default, aten.clone.default,
)  # fmt: skip


@define_pass(Guarantee.REAL)
def canonicalize_pointwise(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(*_CONVOLUTIONS):
        _rewrite(editor, node)


def _rewrite(editor: Editor, node: fx.Node) -> None:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    rank, kernel = len(shape(x) or ()), shape(weight) or ()
    ones = all(s == 1 for name in ("stride", "groups") for s in _listed(argument(node, name)))
    padded = any(p != 0 for p in _listed(argument(node, "padding")))
    if rank != len(kernel) or any(size != 1 for size in kernel[2:]) or not ones or padded:
        return
    functions: list[fx.Node] = []
    inner = x
    while is_call(inner, *_FUNCTIONS) and len(inner.users) == 1:
        functions.append(inner)
        inner = operands(inner)[0]
    if not is_call(inner, *_PERMUTATIONS):
        return
    order = permutation(inner)
    if order[1] != rank - 1:
        return
    matrix = constant_matrix(editor, weight, lambda held: held.flatten(1))
    if matrix is None:
        return
    last = [0, *range(2, rank), 1]
    y = operands(inner)[0]
    order = [order[d] for d in last]
    if order != list(range(rank)):
        y = editor.call(aten.permute.default, y, order, like=inner, before=node)
    for function in reversed(functions):
        y = editor.call(
            function.target, y, *operands(function)[1:], like=function, before=node, **function.kwargs
        )
    given = (y, matrix) if bias is None else (y, matrix, bias)
    y = editor.call(aten.linear.default, *given, like=node)
    editor.applied(node, "a pointwise convolution of what was channels last is a linear")
    first = [0, rank - 1, *range(1, rank - 1)]
    editor.replace(node, editor.call(aten.permute.default, y, first, like=node))


def _listed(argument: object) -> list[object]:
    return list(argument) if isinstance(argument, (list, tuple)) else [argument]
