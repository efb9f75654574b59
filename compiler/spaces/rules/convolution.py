"""Convolutions (the channel axes are those of a linear), pooling and resampling.

===================  =======================================  ===================  =========================
operator             T                                        log-scale            shift
===================  =======================================  ===================  =========================
convolution          channels: T_x and T_y any                W absorbs s_x, s_y   z_y: bias; z_x: without
                                                                                   padding only
groups               inputs and outputs any inside a group,   none                 z_y: bias; z_x: none
                     groups permuted together
depthwise            permutations                             s_y = s_W + s_x      z_y: bias; z_x: none
average pooling      channels any                             s_y = s_x            z_y = z_x without padding
max pooling          permutations                             s_y = s_x            z_y = z_x
nearest, bilinear    channels any                             s_y = s_x            z_y = z_x
===================  =======================================  ===================  =========================

Padding adds zeros, which a shifted input would not have. Spatial dimensions are pinned: their neighbours meet.
"""

from __future__ import annotations

import torch
from torch import fx

from ...graph import argument, place_of, value
from ..analysis import Absorber, Analysis, rule, tensors
from ..atoms import Dim, Group, Reason, flipped, new
from ..potentials import Key

aten = torch.ops.aten

_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@rule(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.convolution.default, *_TRANSPOSED,
)  # fmt: skip
def convolution(analysis: Analysis, node: fx.Node) -> None:
    """x `[B, C, ...]`, weight `[O, C / groups, ...]` (transposed: `[C, O / groups, ...]`)."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    groups = int(argument(node, "groups"))
    transposed = node.target in _TRANSPOSED or (
        node.target == aten.convolution.default and argument(node, "transposed")
    )
    given, kernel = analysis.dims(x), analysis.dims(weight)
    constants = [c for c in (weight, bias) if c is not None]
    if not all(analysis.is_parameter(c) for c in constants) or len(given) != len(kernel):
        for at in (x, *constants, node):
            analysis.pin(node, at, "a convolution with a computed weight, or without a batch")
        return
    analysis.allow(node, [*given[2:], *kernel[2:]], Group.NONE, "a convolution mixes neighbours")
    out = analysis.fresh(node)
    analysis.allow(node, out[2:], Group.NONE, "a convolution mixes neighbours")
    analysis.tie(node, out[0], given[0])
    analysis.dims_of[node] = [given[0], out[1], *out[2:]]
    inputs, outputs = int(value(x).shape[1]), int(value(node).shape[1])
    if groups == 1:
        rows, columns = (1, 0) if transposed else (0, 1)
        analysis.tie(node, given[1], flipped(kernel[columns]))
        analysis.tie(node, out[1], kernel[rows])
        _scales(analysis, node, x, weight, rows, columns)
    elif groups == inputs == outputs and not transposed:
        analysis.tie(node, out[1], kernel[0])
        analysis.tie(node, given[1], kernel[0])
        analysis.allow(
            node, [kernel[0]], Group.PERMUTATION, "a depthwise convolution: each channel by itself"
        )
        analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(weight, 0)), (-1, analysis.key(x)))
    else:
        _grouped(analysis, node, groups, given[1], out[1], kernel, transposed)
        for at in (x, node):
            analysis.pin_scale(node, at, "a grouped convolution")
        for dim in (0, 1):
            analysis.scales.pin(analysis.key(weight, dim), _reason(node, "a grouped convolution"))
    if bias is not None:
        analysis.tie(node, analysis.dims(bias)[0], out[1])
        analysis.same_scale(node, bias)
    _shifts(
        analysis,
        node,
        x,
        weight,
        bias,
        1 if transposed and groups == 1 else 0,
        _unpadded(node, bool(transposed)),
    )


def _reason(node: fx.Node, why: str) -> Reason:
    return Reason(Group.NONE, why, place_of(node))


def _scales(analysis: Analysis, node: fx.Node, x: fx.Node, weight: fx.Node, rows: int, columns: int) -> None:
    analysis.scales.tie((1, analysis.key(x)), (1, analysis.key(weight, columns)))
    analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(weight, rows)))


def _grouped(
    analysis: Analysis,
    node: fx.Node,
    groups: int,
    inputs: Dim,
    outputs: Dim,
    kernel: list[Dim],
    transposed: bool,
) -> None:
    group = new(groups)
    one, several = (kernel[0], kernel[1]) if not transposed else (kernel[1], kernel[0])
    # `several` is the side of the weight that lists the channels of all groups.
    within_out = new(int(value(node).shape[1]) // groups)
    within_in = new(int(value(argument(node, "input")).shape[1]) // groups)
    analysis.tie(node, outputs, (*group, *within_out))
    analysis.tie(node, inputs, (*group, *within_in))
    if not transposed:
        analysis.tie(node, one, (*group, *within_out))
        analysis.tie(node, several, flipped(within_in))
    else:
        analysis.tie(node, several, flipped((*group, *within_in)))
        analysis.tie(node, one, within_out)
    analysis.allow(node, [group], Group.PERMUTATION, "a grouped convolution: each group by itself")


def _unpadded(node: fx.Node, transposed: bool) -> bool:
    if transposed:
        return False  # the edges get fewer terms
    padding = argument(node, "padding")
    if isinstance(padding, str):
        return padding == "valid"
    return all(p == 0 for p in ([padding] if isinstance(padding, int) else padding))


def _shifts(
    analysis: Analysis,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    rows: int,
    unpadded: bool,
) -> None:
    own = analysis.is_own_bias(bias)
    held, groups = analysis.constant(weight), int(argument(node, "groups"))
    reads = writes = None
    if not unpadded or not own or groups != 1:
        analysis.pin_shift(
            node, x, "padding adds zeros" if not unpadded else "a grouped convolution or a shared bias"
        )
    else:
        reads = Key(held, 1 - rows, node)
        analysis.shifts.equal(analysis.key(x), reads)
    if not own:
        analysis.pin_shift(node, node, "its bias is the bias of another operator too")
    elif groups == 1:
        writes = Key(held, rows, node)
    elif bias is not None:
        writes = Key(analysis.constant(bias), 0, node)
    else:
        analysis.pin_shift(node, node, "a grouped convolution without a bias")
    if writes is not None:
        analysis.shifts.equal(analysis.key(node), writes)
    analysis.absorbers.append(Absorber(node, held, bias, reads, writes, rows))


_AVERAGES = (
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec, aten.upsample_nearest1d.default, aten.upsample_nearest2d.default,
)  # fmt: skip
_LARGEST = (aten.max_pool1d.default, aten.max_pool2d.default)


@rule(*_AVERAGES, *_LARGEST)
def pool(analysis: Analysis, node: fx.Node) -> None:
    """Averages commute with everything along the channels, the largest with permutations and positive scales."""
    x = tensors(node)[0]
    given, out = analysis.dims(x), analysis.fresh(node)
    for at in range(2):
        analysis.tie(node, out[at], given[at])
    analysis.dims_of[node] = [*given[:2], *out[2:]]
    analysis.allow(node, [*given[2:], *out[2:]], Group.NONE, "pooling mixes neighbours")
    if node.target in _LARGEST:
        analysis.allow(
            node, given[:2], Group.PERMUTATION, "max pooling: only permutations and positive scales commute"
        )
    analysis.same_scale(node, x)
    schema = node.target._schema  # type: ignore[union-attr]  # an overload
    padded = any(a.name == "padding" for a in schema.arguments)
    if padded and node.target in _AVERAGES and any(argument(node, "padding")):
        for side in (x, node):
            analysis.pin_shift(node, side, "padding adds zeros to the averages")
    else:
        analysis.same_shift(node, x)
