"""LayerNorm on a centred stream is RMSNorm: every writer of the stream loses its mean.

    layer_norm(x) = rms_norm(C x),  C = I - 1 1^T / d,    C x = sum of C (what each writer adds)

Why: LayerNorm subtracts the mean itself, so it does not see the means of the writers; without them its variance is the
mean square, with the same eps. C is no change of basis (it is singular), so it needs more than the space's group: every
value of the stream is written by parameters (linears, embeddings, tables, biases), and read by sums, views and
LayerNorms alone (gains folded before). A linear that reads LayerNorm's output sees centred values either way. Then the
space takes all orthogonal maps instead of those that keep the ones.

REAL: computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..compiler.editor import Editor
from ..compiler.graph import argument, place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import Space, Spaces, analyse
from ..compiler.spaces.atoms import Group, flatten
from ..compiler.spaces.change import Axis, by_parts

aten = torch.ops.aten

_CARRY = frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.layer_norm.default, aten.reshape.default, aten.view.default,
        aten.transpose.int, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
        aten.cat.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default, aten._to_copy.default,
        aten.dropout.default, aten.index.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
        aten.sum.dim_IntList, aten.mean.dim, aten.index_add.default, aten.index_put.default, aten.index_copy.default,
    }
)  # fmt: skip
"""Readers through which a mean stays a mean: linear along the channels."""


@define_pass(Guarantee.REAL)
def center_norms(editor: Editor) -> None:
    """Every `layer_norm(x, shape, None, None, eps)` of a stream that can be centred → `rms_norm`."""
    spaces = analyse(editor.program)
    nodes = {node.name: node for node in editor.graph.nodes}
    norms: dict[str, list[fx.Node]] = {}
    for norm in spaces.centred:
        space = _space_of(spaces, norm)
        if isinstance(space, str):
            editor.refused(nodes[norm.name], space)
        else:
            norms.setdefault(space.name, []).append(norm)
    for space in spaces.spaces:
        if space.name not in norms:
            continue
        reason = _reason_against(spaces, space)
        if reason is not None:
            for norm in norms[space.name]:
                editor.refused(nodes[norm.name], reason)
            continue
        _center(editor, spaces, space)
        for norm in norms[space.name]:
            new = nodes[norm.name]
            x, shape, eps = (argument(new, name) for name in ("input", "normalized_shape", "eps"))
            new.target = aten.rms_norm.default
            new.args, new.kwargs = (x, shape, None, eps), {}
            editor.applied(new, f"layer_norm on {space.name}, whose writers are centred, is rms_norm")


def _space_of(spaces: Spaces, norm: fx.Node) -> Space | str:
    flat = flatten(spaces.dims_of[norm][-1] or ())
    if len(flat) != 1 or flat[0][0].sum is not None:
        return "its channels are split into parts elsewhere"
    space = spaces.space_of(flat[0][0])
    if space is None:
        why = flat[0][0].reasons
        least = next((r for r in why if r.group == Group.NONE), None)
        return (
            f"its channels are pinned: {least.why} ({least.place})"
            if least
            else "no parameter writes its channels"
        )
    return space


def _reason_against(spaces: Spaces, space: Space) -> str | None:
    if space.group != Group.FIX_ONES:
        first = space.bound[0] if space.bound else None
        return f"{first.why} ({first.place})" if first else "its channels need no centring"
    if space.gains:
        return "gains are not folded yet"
    for member in space.values:
        node = member.node
        if node.op == "placeholder":
            return "the stream is an input of the program"
        behind_norm = _is_centred(node)
        for user in node.users:
            if behind_norm or user.op == "get_attr":
                continue
            if user.op != "call_function" or (user.target not in _CARRY):
                return f"{user.target} reads the stream before a norm ({place_of(user)})"
            if user.target is aten.layer_norm.default and not _plain(user):
                return f"a norm with gain or bias ({place_of(user)})"
    return None


def _plain(norm: fx.Node) -> bool:
    return argument(norm, "weight") is None and argument(norm, "bias") is None


def _is_centred(node: fx.Node) -> bool:
    """Whether a value is a norm's output, or a view of one."""
    while node.op == "call_function" and node.target not in (
        aten.layer_norm.default,
        aten.add.Tensor,
        aten.sub.Tensor,
    ):
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        if node.target not in _CARRY or len(inputs) != 1:
            return False
        node = inputs[0]
    return node.target is aten.layer_norm.default


def _center(editor: Editor, spaces: Spaces, space: Space) -> None:
    centre = torch.eye(space.size, dtype=torch.float64) - 1.0 / space.size

    def project(view: Tensor, axes: list[Axis]) -> Tensor:
        # C is symmetric, and what reads the norms' outputs sees centred values: one map for all parameters.
        for at, (atom, _, _) in enumerate(axes):
            if atom is space.atom:
                view = torch.tensordot(centre, view, dims=([1], [at])).movedim(0, at)
        return view

    for name, node in {str(m.node.target): m.node for m in space.parameters}.items():
        held: Tensor = editor.tensors[name]
        editor.set_tensor(name, by_parts(held, spaces.dims_of[node], {space.atom}, project))
