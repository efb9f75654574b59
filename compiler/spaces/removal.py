"""Removing channels: indices of spaces leave every parameter, every value, and every number of the graph that counts
them.

    keep {space name: bool [n]}     p' = p[keep] along every dimension of the space;  shapes of values follow

Equal over the reals where every removed index contributes nothing (`dead_indices`): each contraction over the space
meets a zero on one side there (the value of a writer, or the column of a reader), and a norm over it sees a zero. An
RMS norm divides by the number of channels, so its gain takes sqrt(n / n') and its epsilon n / n'. All else treats
channels one by one.

Numbers of the graph that change: sizes of views and expansions, ends of slices, shapes of norms, groups of depthwise
convolutions, and the scale of attentions, which is written out where it followed from the head size. An operator that
is not known to treat indices one by one refuses (`reason_against`): softmax or LayerNorm over the space, grouped
convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..dialect import linear_grouped
from ..dialect.gated import gated
from ..dialect.rotary import rotary
from ..editor import Editor
from ..graph import argument, place_of, value
from .analysis import Space, Spaces
from .atoms import Atom, Dim, Group, flatten, leaves
from .rules.elementwise import FUNCTIONS
from .support import contracted, nonzero_along, support

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.convolution.default,
)  # fmt: skip
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default)
_ONE_BY_ONE = {
    *FUNCTIONS, *_VIEWS, *_CONVOLUTIONS, gated.overload, rotary.overload, linear_grouped.overload,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.relu.default,
    aten.leaky_relu.default, aten.abs.default, aten._to_copy.default, aten.to.dtype, aten.clone.default,
    aten.dropout.default, aten.contiguous.default, aten.alias.default, aten.transpose.int, aten.permute.default,
    aten.t.default, aten.mT.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.flatten.using_ints, aten.unflatten.int, aten.cat.default, aten.slice.Tensor, aten.narrow.default,
    aten.select.int, aten.stack.default, aten.constant_pad_nd.default, aten.pad.default, aten.index.Tensor,
    aten.index_add.default, aten.repeat_interleave.self_int, aten.linear.default, aten.embedding.default,
    aten.matmul.default, aten.bmm.default,
    aten.scaled_dot_product_attention.default, aten.rms_norm.default, aten.layer_norm.default,
    aten.batch_norm.default, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default,
    aten.cumsum.default, aten.flip.default, aten.softmax.int, aten._softmax.default, aten.log_softmax.int,
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.max_pool1d.default, aten.max_pool2d.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input,
}  # fmt: skip
"""Operators that treat every index of a space by itself, or sum over it (with what `reason_against` leaves out)."""


def labels(dim: Dim, atom: Atom) -> Tensor:
    """int64 `[size]`: the atom's index at every position of a dimension, -1 where the position has none."""
    found = torch.full((1,), -1)
    for inner, _ in flatten(dim or ()):
        if inner is atom:
            own = torch.arange(inner.size)
        elif inner.sum is not None:
            own = torch.cat([torch.empty(0, dtype=torch.int64), *(labels(part, atom) for part in inner.sum)])
        else:
            own = torch.full((inner.size,), -1)
        found = torch.maximum(found[:, None], own[None]).flatten()
    return found


def kept(dim: Dim, keep: Mapping[Atom, Tensor]) -> Tensor:
    """bool `[size]`: which positions of a dimension stay."""
    found = torch.ones(1, dtype=torch.bool)
    for inner, _ in flatten(dim or ()):
        if inner in keep:
            own = keep[inner]
        elif inner.sum is not None:
            own = torch.cat([torch.empty(0, dtype=torch.bool), *(kept(part, keep) for part in inner.sum)])
        else:
            own = torch.ones(inner.size, dtype=torch.bool)
        found = (found[:, None] & own[None]).flatten()
    return found


def _has(dim: Dim, atom: Atom) -> bool:
    return any(inner is atom for inner, _ in leaves(dim))


def reason_against(spaces: Spaces, space: Space) -> str | None:
    """Why no index of a space can be removed, or None."""
    if space.group in (Group.PAIR, Group.PAIR_ORTHOGONAL):
        return f"its channels turn in pairs: {space.bound[0].why}"
    for node in spaces.program.graph.nodes:
        if node.op != "call_function":
            continue
        operands = [spaces.constant(n) for n in node.all_input_nodes]
        touched = [
            n for n in (node, *operands) if any(_has(d, space.atom) for d in spaces.dims_of.get(n, []))
        ]
        why = _reason(spaces, space.atom, node) if touched else None
        if why is not None:
            return f"{why} ({place_of(node)})"
    return None


def _reason(spaces: Spaces, atom: Atom, node: fx.Node) -> str | None:
    name = str(node.target)
    if node.target not in _ONE_BY_ONE:
        return f"{name} is not known to treat channels one by one"

    def over(operand: Any, *dims: int) -> bool:
        given = spaces.dims_of.get(spaces.constant(operand), []) if isinstance(operand, fx.Node) else []
        return any(_has(given[d], atom) for d in dims if -len(given) <= d < len(given))

    if node.target == aten.layer_norm.default and over(argument(node, "input"), -1):
        return "layer_norm takes the mean over it, so that one channel less moves all others"
    if node.target in (aten.softmax.int, aten._softmax.default, aten.log_softmax.int):
        return "softmax over it" if over(node.args[0], int(argument(node, "dim"))) else None
    if node.target == aten.scaled_dot_product_attention.default:
        read = (argument(node, "query"), argument(node, "key"), argument(node, "value"))
        return "attention: softmax over it" if any(over(x, -2) for x in read) else None
    if node.target == rotary.overload:
        in_heads = argument(node, "heads") >= 0 and over(node.args[0], argument(node, "head_dim_index"))
        return "rotary: some of its heads turn" if in_heads else None
    if node.target == aten.rms_norm.default and over(argument(node, "input"), -1):
        weight = argument(node, "weight")
        if weight is None or any(u.target != node.target for u in weight.users):
            return "rms_norm over it has no gain of its own to make up for the number of channels"
        return None
    if node.target in _CONVOLUTIONS and int(argument(node, "groups")) > 1 and not _depthwise(node):
        return "a grouped convolution"
    return None


def _depthwise(node: fx.Node) -> bool:
    groups = int(argument(node, "groups"))
    return bool(groups == value(argument(node, "input")).shape[1] == value(node).shape[1])


def dead_indices(spaces: Spaces, chosen: Sequence[Space]) -> dict[str, Tensor]:
    """bool `[n]` for each of the spaces: which indices contribute nothing, whatever the inputs. One run of the
    program."""
    found = support(spaces.program)
    live = {space.name: torch.zeros(space.size, dtype=torch.bool) for space in chosen}
    for node in spaces.program.graph.nodes:
        sides = contracted(node) if node.op == "call_function" else []
        if not sides:
            continue
        both = torch.stack([nonzero_along(found, operand, dim) for operand, dim in sides]).all(0)
        operand, at = sides[0]
        dim = spaces.dims_of[spaces.constant(operand)][at]
        for space in chosen:
            if _has(dim, space.atom):
                at_index = labels(dim, space.atom)
                live[space.name][at_index[both & (at_index >= 0)]] = True
    return {name: ~alive for name, alive in live.items()}


def removed_from(tensor: Tensor, dims: Sequence[Dim], keep: Mapping[Atom, Tensor]) -> Tensor:
    """A tensor of these dimensions without what does not stay."""
    for index, dim in enumerate(dims):
        stays = kept(dim, keep) if dim else torch.ones(tensor.shape[index], dtype=torch.bool)
        if not bool(stays.all()):
            tensor = tensor.index_select(index, stays.nonzero().flatten())
    return tensor.contiguous()


def remove(editor: Editor, spaces: Spaces, keep: Mapping[str, Tensor]) -> list[str]:
    """Remove what `keep` does not keep from the editor's program, of which `spaces` is the analysis.

    Returns the names of the parameters that changed. Spaces for which `reason_against` has one must not be among them.
    """
    by_atom = {space.atom: keep[space.name] for space in spaces.spaces if space.name in keep}
    changed = []
    for node in _parameters(spaces, set(by_atom)):
        name = str(node.target)
        editor.set_tensor(name, removed_from(editor.tensors[name].detach(), spaces.dims_of[node], by_atom))
        changed.append(name)
    own = {node.name: node for node in editor.graph.nodes}
    rescaled: set[str] = set()
    for old in spaces.program.graph.nodes:
        if old.op == "call_function":
            _renumber(editor, spaces, old, own[old.name], by_atom, rescaled)
    editor.refresh_all()
    return changed


def _parameters(spaces: Spaces, atoms: set[Atom]) -> Iterator[fx.Node]:
    for node, dims in spaces.dims_of.items():
        if node.op == "get_attr" and any(atom in atoms for dim in dims for atom, _ in leaves(dim)):
            yield node


def _renumber(
    editor: Editor,
    spaces: Spaces,
    old: fx.Node,
    node: fx.Node,
    keep: Mapping[Atom, Tensor],
    rescaled: set[str],
) -> None:
    """Let a call count the channels that are left."""

    def masks(at: fx.Node) -> list[Tensor | None]:
        dims = spaces.dims_of.get(spaces.constant(at), [])
        return [None if dim is None else kept(dim, keep) for dim in dims]

    def left(mask: Tensor | None, given: Any) -> Any:
        if mask is None or not isinstance(given, int) or given < 0 or given != len(mask):
            return given
        return int(mask.sum())

    target = old.target
    if target in _VIEWS:
        name = "shape" if target == aten.reshape.default else "size"
        sizes = argument(old, name)
        new = [left(m, given) for m, given in zip(masks(old), argument(node, name), strict=True)]
        if new != list(sizes):
            _set(node, name, new)
    elif target == aten.unflatten.int:
        at = int(argument(old, "dim")) % len(value(argument(old, "self")).shape)
        sizes = argument(node, "sizes")
        _set(node, "sizes", [left(m, given) for m, given in zip(masks(old)[at:], sizes, strict=False)])
    elif target in (aten.slice.Tensor, aten.narrow.default):
        _renumber_slice(old, node, masks(old.args[0]))  # type: ignore[arg-type]  # a node
    elif target == aten.rms_norm.default:
        mask = masks(argument(old, "input"))[-1]
        if mask is not None and not bool(mask.all()):
            _renumber_norm(editor, old, node, mask, rescaled)
    elif target == aten.layer_norm.default:
        return
    elif target in _CONVOLUTIONS and int(argument(old, "groups")) > 1:
        _set(node, "groups", left(masks(old)[1], int(argument(old, "groups"))))
    elif target == aten.scaled_dot_product_attention.default and argument(old, "scale") is None:
        mask = masks(argument(old, "query"))[-1]
        if mask is not None and not bool(mask.all()):
            _set(node, "scale", len(mask) ** -0.5)


def _renumber_slice(old: fx.Node, node: fx.Node, masks: list[Tensor | None]) -> None:
    dim = int(argument(old, "dim")) % len(masks)
    mask = masks[dim]
    if mask is None or bool(mask.all()):
        return
    size = len(mask)

    def before(index: int) -> int:
        index = min(max(index + size if index < 0 else index, 0), size)
        return int(mask[:index].sum())

    start, last = argument(old, "start"), "length" if old.target == aten.narrow.default else "end"
    first = 0 if start is None else int(start)
    end = argument(old, last)
    end = size if end is None else int(end) + (first if last == "length" else 0)
    _set(node, "start", before(first))
    _set(node, last, before(end) - (before(first) if last == "length" else 0))


def _renumber_norm(editor: Editor, old: fx.Node, node: fx.Node, mask: Tensor, rescaled: set[str]) -> None:
    ratio = len(mask) / int(mask.sum())
    eps = argument(old, "eps")
    eps = torch.finfo(value(old).dtype).eps if eps is None else eps
    name = str(argument(old, "weight").target)
    if name not in rescaled:
        held = editor.tensors[name]
        editor.set_tensor(name, (held.double() * math.sqrt(ratio)).to(held.dtype))
        rescaled.add(name)
    _set(node, "normalized_shape", [int(mask.sum())])
    _set(node, "eps", float(eps) * ratio)


def _set(node: fx.Node, name: str, given: Any) -> None:
    """Give an argument of a call another value."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    at = [a.name for a in declared].index(name)
    if name in node.kwargs or declared[at].kwarg_only:
        node.update_kwarg(name, given)
        return
    # Arguments that were left at their defaults are spelled out up to this one.
    node.args = (*node.args, *(a.default_value for a in declared[len(node.args) : at + 1]))
    node.update_arg(at, given)
