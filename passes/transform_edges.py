"""Readers see a value through a transform of their own: `x → ((x - z) r) H`, W' = W diag(1/r) H, b' = b + W z.

    W x + b = (W diag(1/r) H) (((x - z) r) H)^T + (b + W z),   H H^T = I

REAL, and legal at every layer, whatever wrote the value: nothing but the readers' own constants changes, so
post-norm residual streams, GELU outputs and values that many others read are fine. What it costs is a
subtraction, a multiplication and a Hadamard transform (n log n) in front of the readers, which the activation
quantizer takes up where one follows.

The vectors in the graph are float32, so the readers get W divided by r as it is stored and b + W z with z as stored:
the only rounding left is that of W' and b' themselves, once, from float64.

Side conditions: r > 0 and finite; a convolution that pads cannot be shifted, as its zeros would have to move with
x; a bias must be a constant to take the shift; a Hadamard transform is over the last dimension, so for linears only.
Where one reader of a site refuses the shift, none is shifted, as they share x. A weight that other layers
read too keeps its old form for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import hadamard
from ..compiler.editor import Editor
from ..compiler.graph import argument, shape
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe
from .layers import Layer, constant_name, set_argument
from .sites import EdgeTransform, Site, check_names, find_sites

aten = torch.ops.aten


@define_pass(Guarantee.REAL)
def transform_edges(editor: Editor, *, recipe: Recipe, transforms: Mapping[str, EdgeTransform]) -> None:
    """Apply `transforms`, by the names of the sites of `recipe`, in front of their readers.

    Sites without an entry and identities are left alone. Raises InputError for unknown names and wrong sizes.
    """
    sites = find_sites(editor.program, recipe)
    check_names(transforms, sites)
    by_name = {node.name: node for node in editor.graph.nodes}
    for site in sites:
        transform = transforms.get(site.name)
        if transform is None or transform.is_identity:
            continue
        readers = [_layer(by_name[reader.node], site) for reader in site.readers]
        _apply(editor, site, transform, readers)


def _layer(node: fx.Node, site: Site) -> Layer:
    path = next(reader.path for reader in site.readers if reader.node == node.name)
    return Layer(site.kind, node, argument(node, "weight"), path)


def _apply(editor: Editor, site: Site, transform: EdgeTransform, readers: list[Layer]) -> None:
    at = readers[0].node
    shift = transform.shift if transform.shift is not None and bool(transform.shift.any()) else None
    reason = None if shift is None else site.shift_refusal or _computed_bias(editor, readers)
    if reason:
        editor.refused(at, f"no shift: {reason}")
        shift = None
    orders = transform.hadamard
    if orders and site.channel_dim != -1:
        editor.refused(at, "no Hadamard transform: its channels are not the last dimension")
        orders = ()
    # As stored: what is folded into the readers is the inverse of exactly these numbers.
    z = None if shift is None else shift.float()
    r = None if transform.scale is None else (1 / transform.scale.double()).float()
    stored = EdgeTransform(None if r is None else 1 / r.double(), None if z is None else z.double(), orders)
    if stored.is_identity:
        return
    first = min(readers, key=lambda layer: _position(editor, layer.node)).node
    moved = readers[0].input
    for vector, part, operator in ((z, "shift", aten.sub.Tensor), (r, "scale", aten.mul.Tensor)):
        if vector is not None:
            held = editor.constant(_broadcast(vector, moved, site.channel_dim), f"{at.name}_input_{part}")
            moved = editor.call(operator, moved, held, like=first)
    if orders:
        moved = editor.call(hadamard.overload, moved, list(orders), False, like=first)
    folded: dict[fx.Node, fx.Node] = {}
    for layer in readers:
        _fold(editor, layer, stored, folded)
        set_argument(layer.node, "input", moved)
        editor.refresh(layer.node)
    kept = sum(w.meta["val"].numel() * w.meta["val"].element_size() for w in folded if w.users)
    facts: dict[str, Any] = {"readers": [layer.path for layer in readers]}
    if z is not None:
        facts["largest_shift"] = float(z.abs().max())
    if stored.scale is not None:
        facts |= {"least_scale": float(stored.scale.min()), "largest_scale": float(stored.scale.max())}
    if orders:
        facts["hadamard"] = list(orders)
    if kept:
        facts["bytes_added"] = kept
    parts = ["shift"] * (z is not None) + ["scale"] * (r is not None) + ["Hadamard transform"] * bool(orders)
    editor.applied(at, f"{', '.join(parts)} on the edge to {len(readers)} layers", **facts)


def _position(editor: Editor, wanted: fx.Node) -> int:
    return next(index for index, node in enumerate(editor.graph.nodes) if node is wanted)


def _broadcast(vector: Tensor, x: fx.Node, dim: int) -> Tensor:
    return vector if dim == -1 else vector.reshape([-1, *[1] * (len(shape(x) or ()) - 1 - dim)])


def _computed_bias(editor: Editor, readers: list[Layer]) -> str | None:
    for layer in readers:
        bias = argument(layer.node, "bias")
        if bias is not None and editor.tensor(bias) is None:
            return f"the bias of {layer.path or layer.node.name} is computed in the graph, not a constant"
    return None


def _fold(editor: Editor, layer: Layer, stored: EdgeTransform, done: dict[fx.Node, fx.Node]) -> None:
    """W' and b' for one reader; readers that share a weight share the new one."""
    weight, bias = editor.tensor(layer.weight), argument(layer.node, "bias")
    assert weight is not None
    shaped, weight = weight.shape, weight.flatten(0, 1) if layer.is_grouped else weight
    added = stored.offset(weight)
    if added is not None:
        added = added.reshape(shaped[:2]) if layer.is_grouped else added
        held = editor.tensor(bias)
        total = added if held is None else held.double() + added
        name = constant_name(editor, layer.weight, "bias") if held is None else editor.name_of(bias)
        set_argument(layer.node, "bias", editor.constant(total.to(weight.dtype), name))
    if stored.scale is None and not stored.hadamard:
        return
    if layer.weight not in done:
        new = stored.fold(weight).to(weight.dtype).reshape(shaped)
        done[layer.weight] = editor.constant(new, editor.name_of(layer.weight))
    set_argument(layer.node, "weight", done[layer.weight])
