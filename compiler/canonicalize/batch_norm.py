"""Fold batch norm at inference into the convolution or linear in front of it.

    gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (a W) x + (a (b - mean) + beta),
    a = gamma / sqrt(var + eps)

a scales output channels: rows of the weight, whatever the padding (a padded zero passes through W only). For a
transposed convolution the output channels are the second dimension, within each group.

Side conditions: running statistics are used; the convolution has no other reader; weight, bias and all four
vectors are constants; behind a linear, the channel is the last dimension. New tensors are made, so a weight
that is shared keeps its value elsewhere. Computed in float64, rounded once. Exactness: real.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .match import aten, is_call, operands

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_BATCH_NORMS = (
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
)


@define_pass(Guarantee.REAL)
def fold_batch_norm(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(*_BATCH_NORMS):
        reason = _refusal(editor, node)
        if reason is not None:
            editor.refused(node, reason)
            continue
        _fold(editor, node)


def _refusal(editor: Editor, node: fx.Node) -> str | None:
    source = operands(node)[0]
    if not is_call(source, aten.linear.default, *_CONVOLUTIONS):
        return "there is no convolution or linear right before it"
    if len(source.users) != 1:
        return "the convolution or linear before it has other readers"
    if is_call(source, aten.linear.default) and len(shape(source) or ()) != 2:
        return "the linear's features are its last dimension, the batch norm's channels the second"
    if any(bool(argument(node, name)) for name in ("training",) if _has(node, name)):
        return "it uses the statistics of the batch"
    needed = [operands(source)[1], *(argument(node, name) for name in ("running_mean", "running_var"))]
    optional = [argument(source, "bias"), argument(node, "weight"), argument(node, "bias")]
    if any(editor.tensor(t) is None for t in needed) or any(
        t is not None and editor.tensor(t) is None for t in optional
    ):
        return "its vectors, or the weight before it, are computed by the model"
    return None


def _has(node: fx.Node, name: str) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    return any(declared.name == name for declared in node.target._schema.arguments)


def _fold(editor: Editor, node: fx.Node) -> None:
    source = operands(node)[0]
    assert isinstance(source, fx.Node)
    weight = editor.tensor(operands(source)[1])
    assert weight is not None
    transposed = source.target in _TRANSPOSED or (
        is_call(source, aten.convolution.default) and bool(argument(source, "transposed"))
    )
    groups = int(argument(source, "groups")) if not is_call(source, aten.linear.default) else 1

    def read(owner: fx.Node, name: str, default: float) -> Tensor:
        held = editor.tensor(argument(owner, name))
        return torch.tensor([default], dtype=torch.float64) if held is None else held.to(torch.float64)

    eps = float(argument(node, "eps") if _has(node, "eps") else argument(node, "epsilon"))
    scale = read(node, "weight", 1.0) / torch.sqrt(read(node, "running_var", 1.0) + eps)
    bias = (read(source, "bias", 0.0) - read(node, "running_mean", 0.0)) * scale + read(node, "bias", 0.0)
    spatial = [1] * (weight.dim() - 2)
    if transposed:
        grouped = weight.to(torch.float64).unflatten(0, (groups, -1))
        folded = (grouped * scale.view(groups, 1, -1, *spatial)).flatten(0, 1)
    else:
        folded = weight.to(torch.float64) * scale.view(-1, 1, *spatial)
    name = editor.name_of(operands(source)[1])
    changed: dict[str, Any] = {
        "weight": editor.constant(folded.to(weight.dtype), f"{name}_folded"),
        "bias": editor.constant(bias.to(weight.dtype), f"{name}_folded_bias"),
    }
    assert isinstance(source.target, torch._ops.OpOverload)
    declared = [a.name for a in source.target._schema.arguments]
    arguments = [changed.get(argument_name, argument(source, argument_name)) for argument_name in declared]
    new = editor.call(source.target, *arguments, like=source, before=node)
    editor.applied(node, "batch norm folded into the weight before it")
    for user in list(node.users):
        if user.target is operator.getitem and operands(user)[1] == 0:
            editor.replace(user, new)
        elif user.target is not operator.getitem:
            user.replace_input_with(node, new)
        elif not user.users:
            editor.erase(user)
    if not node._erased and not node.users:
        editor.erase(node)
