"""Products with a constant matrix become `aten.linear(x, weight, bias)`.

    x @ W^T,  mm(x, W^T),  addmm(b, x, W^T),  linear(x, W) + b

`aten.linear` contracts the last dimension of x with the last of the weight. A matrix that stands the other way
round is transposed once. A constant vector added to a linear is its bias; two of them are summed in float64. A linear
works on each row by itself, so leading dimensions that are merged in front of it and split behind it stay as they are.

Side conditions: the matrix is a constant of two dimensions; the linear has no reader but the addition, and the
vector spans its last dimension only; all readers split the leading dimensions again. Exactness: real (the bias is
added in another place of the same sum).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import argument, only_user, shape
from ..passes import Guarantee, define_pass
from .match import ADDITIONS, RESHAPES, aten, either_order, equal_sizes, fake_dim, is_call, operands, vector

_TRANSPOSITIONS = (aten.t.default, aten.transpose.int, aten.permute.default)


@define_pass(Guarantee.REAL)
def canonicalize_linear(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.mm.default, aten.matmul.default):
        x, matrix = operands(node)[:2]
        if isinstance(x, fx.Node) and editor.tensor(x) is None:
            _rewrite(editor, node, x, matrix, None)
    for node in editor.calls(aten.addmm.default):
        bias, x, matrix = operands(node)[:3]
        if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
            editor.refused(node, "addmm scales its operands by alpha or beta")
        elif isinstance(x, fx.Node) and vector(editor, bias, (shape(node) or (0,))[-1]) is not None:
            _rewrite(editor, node, x, matrix, bias)
    for node in editor.calls(aten.linear.default):
        _absorb_bias(editor, node)
    for node in editor.calls(aten.linear.default):
        _keep_leading_dimensions(editor, node)


def _rewrite(editor: Editor, node: fx.Node, x: fx.Node, matrix: object, bias: object) -> None:
    """linear for x @ matrix, with `matrix` a constant `[in, out]`."""
    weight: fx.Node | None = None
    if is_call(matrix, *_TRANSPOSITIONS) and fake_dim(matrix) == 2 and _swaps(matrix):
        source = operands(matrix)[0]
        held = editor.tensor(source)
        weight = source if held is not None and held.dim() == 2 and isinstance(source, fx.Node) else None
    held = editor.tensor(matrix)
    if weight is None and held is not None and held.dim() == 2 and isinstance(matrix, fx.Node):
        weight = editor.constant(held.t(), f"{editor.name_of(matrix)}_transposed")
    if weight is None:
        return
    arguments = (x, weight) if bias is None else (x, weight, bias)
    editor.applied(node, f"{node.target} with a constant matrix is a linear")
    editor.replace(node, editor.call(aten.linear.default, *arguments, like=node))


def _swaps(node: fx.Node) -> bool:
    """Whether a call that permutes two dimensions really swaps them."""
    if is_call(node, aten.permute.default):
        return [d % 2 for d in operands(node)[1]] == [1, 0]
    if is_call(node, aten.transpose.int):
        return int(operands(node)[1]) % 2 != int(operands(node)[2]) % 2
    return True


def _absorb_bias(editor: Editor, linear: fx.Node) -> None:
    addition = only_user(linear)
    if not is_call(addition, *ADDITIONS) or argument(addition, "alpha") != 1:
        return
    size = (shape(linear) or (0,))[-1]
    for left, right in either_order(addition):
        added = vector(editor, right, size) if left is linear else None
        if added is None or len(shape(addition) or ()) != len(shape(linear) or ()):
            continue
        old = argument(linear, "bias")
        held = editor.tensor(old)
        if old is not None and held is None:
            editor.refused(addition, "the linear already has a bias that is no constant")
            return
        name = (
            f"{editor.name_of(operands(linear)[1])}_bias"
            if isinstance(operands(linear)[1], fx.Node)
            else "bias"
        )
        bias = (
            right if held is None and _is_vector(editor, right) else editor.constant(_sum(added, held), name)
        )
        editor.applied(addition, "a constant added to a linear is its bias")
        new = editor.call(
            aten.linear.default, operands(linear)[0], operands(linear)[1], bias, like=linear, before=addition
        )
        editor.replace(addition, new)
        return


def _keep_leading_dimensions(editor: Editor, linear: fx.Node) -> None:
    """reshape(linear(reshape(x, [-1, K])), [..., N]) is linear(x), and so with squeeze and unsqueeze."""
    merged = operands(linear)[0]
    x = operands(merged)[0] if is_call(merged, *RESHAPES, aten.unsqueeze.default) else None
    outer, inner = shape(x) if isinstance(x, fx.Node) else None, shape(merged)
    if not outer or not inner or len(outer) == len(inner) or not equal_sizes(outer[-1], inner[-1]):
        return
    wanted = (*outer[:-1], (shape(linear) or (0,))[-1])

    def splits(user: fx.Node) -> bool:
        size = shape(user) or ()
        return (
            is_call(user, *RESHAPES, aten.squeeze.dim, aten.squeeze.dims)
            and len(size) == len(wanted)
            and all(equal_sizes(a, b) for a, b in zip(size, wanted, strict=True))
        )

    if not linear.users or not all(splits(user) for user in linear.users):
        return
    editor.applied(linear, "leading dimensions are not merged around a linear")
    new = editor.call(aten.linear.default, x, *operands(linear)[1:], like=linear)
    for user in list(linear.users):
        editor.replace(user, new)


def _is_vector(editor: Editor, node: object) -> bool:
    held = editor.tensor(node)
    return held is not None and held.dim() == 1


def _sum(added: Tensor, held: Tensor | None) -> Tensor:
    if held is None:
        return added
    return (added.to(torch.float64) + held.to(torch.float64)).to(added.dtype)
