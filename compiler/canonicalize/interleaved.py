"""A linear whose outputs are taken in turn writes them in blocks.

    linear(x, W, b)[..., r::k]   →   linear(x, W', b')[..., r N / k : (r + 1) N / k],    W' = [W[0::k]; W[1::k]; ...]

Gate and up of some experts lie in turn. As blocks they are two spaces of channels and two ranges of memory, as
everywhere else. The same for `isofold.linear_grouped`, whose matrices are all put in this order.

Side conditions: k divides N; all that reads the result takes every k-th output; weight and bias are constants that
nothing else reads (a copy would add bytes). Exactness: real (a product may sum a row elsewhere in another order).
"""

from __future__ import annotations

import torch
from torch import fx

from ..dialect import linear_grouped
from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .match import aten, slice_bounds


@define_pass(Guarantee.REAL)
def canonicalize_interleaved(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.linear.default, linear_grouped.overload):
        step = _step(node)
        if step is None:
            continue
        weight, bias = argument(node, "weight"), argument(node, "bias")
        constants = [c for c in (weight, bias) if c is not None]
        if any(editor.tensor(c) is None for c in constants):
            continue
        if any(_readers(editor, c) > 1 for c in constants):
            editor.refused(node, f"its outputs are taken in turn, by {step}, but others read its weight too")
            continue
        _in_blocks(editor, node, step)


def _readers(editor: Editor, constant: fx.Node) -> int:
    reads = (n for n in editor.graph.nodes if n.op == "get_attr" and n.target == constant.target)
    return sum(len(n.users) for n in reads)


def _step(node: fx.Node) -> int | None:
    """k where all that reads a linear takes every k-th output."""
    size = (shape(node) or (None,))[-1]
    bounds = [slice_bounds(user) if user.target == aten.slice.Tensor else None for user in node.users]
    if not isinstance(size, int) or not bounds or bounds[0] is None:
        return None
    step, last = bounds[0][3], len(shape(node) or ()) - 1
    if step < 2 or size % step:
        return None
    for found in bounds:
        if found is None or found[0] != last or found[3] != step or found[1] >= step:
            return None
        if len(range(*found[1:])) != size // step:
            return None
    return step


def _in_blocks(editor: Editor, node: fx.Node, step: int) -> None:
    for name in ("weight", "bias"):
        constant = argument(node, name)
        if constant is None:
            continue
        held = editor.tensor(constant)
        assert held is not None
        # The outputs are the first dimension, or the one behind that of experts.
        dim = 1 if node.target == linear_grouped.overload else 0
        order = torch.arange(held.shape[dim]).unflatten(0, (-1, step)).mT.flatten()
        editor.set_tensor(editor.name_of(constant), held.detach().index_select(dim, order))
    for user in list(node.users):
        _, start, end, _ = slice_bounds(user) or (0, 0, 0, 0)
        size, dim = len(range(start, end, step)), len(shape(node) or ()) - 1
        block = editor.call(aten.slice.Tensor, node, dim, start * size, (start + 1) * size, 1, like=user)
        editor.replace(user, block)
    editor.applied(node, f"outputs that are taken in turn, by {step}, lie in blocks")
