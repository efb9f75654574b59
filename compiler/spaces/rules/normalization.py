"""Norms. N is the norm without its gain and bias, y = N(x) * gain + bias.

==============  ==========================================================  ====================  ==================
operator        T                                                           log-scale             shift
==============  ==========================================================  ====================  ==================
rms_norm        orthogonal, once the gain is folded to one                  s_x = 0, s_y = gain   none (no bias)
layer_norm      orthogonal maps that keep the ones (all orthogonal ones     s_x = 0, s_y = gain   z_x = 0, z_y: bias
                where every writer is centred: it is rms_norm then)
group_norm      permutations                                                s_x = 0, s_y = 0      none
batch_norm      permutations                                                s_x = 0, s_y = gain   none
==============  ==========================================================  ====================  ==================

A common factor of a norm's input would change what eps means; it stays one. Every dimension beside the normalized one
takes permutations only.
"""

from __future__ import annotations

import torch
from torch import fx

from ...graph import argument
from ..analysis import Analysis, Gain, rule
from ..atoms import Group

aten = torch.ops.aten


@rule(aten.rms_norm.default, aten.layer_norm.default)
def norm(analysis: Analysis, node: fx.Node) -> None:
    """RMSNorm and LayerNorm over the last dimensions."""
    x, shape, weight = (argument(node, name) for name in ("input", "normalized_shape", "weight"))
    layer = node.target == aten.layer_norm.default
    bias = argument(node, "bias") if layer else None
    constants = [c for c in (weight, bias) if c is not None]
    dims = list(analysis.dims(x))
    analysis.dims_of[node] = dims
    last = len(dims) - len(shape)
    if len(shape) != 1 or not all(analysis.is_parameter(c) for c in constants):
        for at in (x, *constants):
            analysis.pin(node, at, "a norm over several dimensions, or with a computed gain")
        analysis.pin(node, node, "a norm over several dimensions, or with a computed gain")
        return
    name = "layer_norm" if layer else "rms_norm"
    group = Group.FIX_ONES if layer else Group.ORTHOGONAL
    analysis.allow(
        node,
        dims[last:],
        group,
        f"{name}: {'the mean of the channels is taken' if layer else 'norms are kept'}",
    )
    analysis.allow(node, dims[:last], Group.PERMUTATION, f"{name}: each row by itself")
    for c in constants:
        analysis.tie(node, dims[-1], analysis.dims(c)[0])
    analysis.pin_scale(node, x, f"{name} of a scaled value")
    analysis.pin_shift(node, x, f"{name} of a shifted value")
    if layer:
        analysis.centred.append(node)
    if weight is None:
        analysis.pin_scale(node, node, f"{name} has no gain")
        if bias is not None:
            analysis.pin_scale(node, bias, f"{name} has no gain")
    else:
        analysis.gains.append(Gain(node, analysis.constant(weight), x, norm=True))
        analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(weight)))
        if bias is not None:
            analysis.same_scale(node, bias)
    # A bias is added where there is none; it must be read here alone.
    if layer and weight is not None and (bias is None or len(bias.users) == 1):
        analysis.shifts.equal(analysis.key(node), analysis.key(bias if bias is not None else weight))
        return
    analysis.pin_shift(node, node, f"{name} has no bias of its own")


@rule(aten.group_norm.default, aten.instance_norm.default, aten.batch_norm.default)
def grouped(analysis: Analysis, node: fx.Node) -> None:
    """Norms over other dimensions than the channels: a table for each channel, permuted with it."""
    x = argument(node, "input")
    name = str(node.target).split(".")[1]
    dims = list(analysis.dims(x))
    analysis.dims_of[node] = dims
    group = Group.PERMUTATION
    if node.target == aten.group_norm.default and argument(node, "num_groups") not in (
        1,
        getattr(dims[1], "size", None),
    ):
        group = Group.NONE  # channels may only move inside a group
    analysis.allow(node, dims, group, f"{name}: only permutations commute")
    for table in ("weight", "bias", "running_mean", "running_var"):
        try:
            held = argument(node, table)
        except KeyError:
            continue
        if held is not None:
            analysis.tie(node, dims[1], analysis.dims(held)[0])
            analysis.pin_scale(node, held, name)
            analysis.pin_shift(node, held, name)
    for at in (x, node):
        analysis.pin_scale(node, at, name)
        analysis.pin_shift(node, at, name)
