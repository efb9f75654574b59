"""Grouped linears get the layouts that kernels read: each expert's matrix is packed like one of its own.

    linear_grouped(quantize_dequantize(x), e, dequantize_weight(w)) → linear_grouped_packed(quantize_activation(x), ...)
    linear_grouped(x, e, dequantize_weight(w))                      → linear_grouped_packed_float(x, e, pack(w))
    linear_grouped(x, e, W)                                         → linear_grouped_dense(x, e, panels of W)

The rows of every expert are padded to whole panels, so that each begins at one, and the experts share one scale
multiplier.

Side conditions: the weights are constants, and their dense form is float32. Exactness: REAL, as for `pack_linears` and
`pack_dense_linears`: codes and values are moved, not changed, and only the order of roundings differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.dialect import (
    linear_grouped,
    linear_grouped_dense,
    linear_grouped_packed,
    linear_grouped_packed_float,
)
from ..compiler.dialect.dense_packing import pack_dense
from ..compiler.dialect.packing import LANES, PackedLinear, pack_linear
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype
from ..compiler.passes import Guarantee, define_pass
from .layers import QuantizedWeight, constant_name, narrowest_bits
from .pack_linears import packable_layers, packed_activations, width_of


@define_pass(Guarantee.REAL)
def pack_grouped_linears(editor: Editor) -> None:
    """Pack all grouped linears whose weight is a `dequantize_weight` of constants."""
    packable = packable_layers(editor, grouped=True)
    activations = packed_activations(editor, packable)
    packed: dict[fx.Node, tuple[PackedLinear, dict[str, fx.Node]]] = {}
    for layer, quantized in packable:
        if layer.weight not in packed:
            packed[layer.weight] = _pack(editor, quantized)
        matrices, nodes = packed[layer.weight]
        expert, bias, width = argument(layer.node, "expert"), argument(layer.node, "bias"), width_of(layer)
        weights = (nodes["packed"], nodes["packed_scale"], nodes.get("packed_zero"))
        experts, n, k = quantized.codes.shape
        attributes = (n, k, matrices.bits, matrices.group_size, matrices.scale_multiplier)
        if layer.node in activations:
            u, params = activations[layer.node]
            sums = nodes["packed_wsum"]
            new = editor.call(
                linear_grouped_packed.overload,
                u,
                params,
                expert,
                *weights,
                sums,
                bias,
                *attributes,
                like=layer.node,
            )
        else:
            x = layer.input
            new = editor.call(
                linear_grouped_packed_float.overload, x, expert, *weights, bias, *attributes, like=layer.node
            )
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"int{matrices.bits} {experts} x {n} x {k} packed",
            bits=matrices.bits,
            group_size=matrices.group_size,
            bytes_after=matrices.nbytes,
            activations=width,
        )


def _pack(editor: Editor, quantized: QuantizedWeight) -> tuple[PackedLinear, dict[str, fx.Node]]:
    """All experts as one matrix, and its parts as constants `[E, ...]`."""
    experts = quantized.codes.shape[0]
    matrices = pack_linear(
        _one_above_the_other(quantized.codes),
        _one_above_the_other(quantized.scale),
        None if quantized.zero is None else _one_above_the_other(quantized.zero),
        narrowest_bits(quantized, (2, 3, 4)),
        quantized.group_size,
    )
    tensors = {
        "packed": matrices.weight,
        "packed_scale": matrices.scale,
        "packed_zero": matrices.zero,
        "packed_wsum": matrices.wsum,
    }
    nodes = {
        part: editor.constant(tensor.unflatten(0, (experts, -1)), constant_name(editor, quantized.node, part))
        for part, tensor in tensors.items()
        if tensor is not None
    }
    return matrices, nodes


def _one_above_the_other(tensor: Tensor) -> Tensor:
    """`[E, N, ...]` → `[E Np, ...]`, each expert padded to whole panels."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[1] % LANES)).flatten(0, 1)


@define_pass(Guarantee.REAL)
def pack_grouped_dense(editor: Editor) -> None:
    """Give the float32 weights of grouped linears the layout of `linear_dense`, for every runtime: none has a
    product of its own for them."""
    made: dict[fx.Node, fx.Node] = {}
    for node in editor.calls(linear_grouped.overload):
        weight = argument(node, "weight")
        held = editor.tensor(weight)
        if held is None:
            editor.refused(node, "its weights are computed, so they cannot be stored in another order")
            continue
        if held.dim() != 3 or held.dtype != torch.float32 or dtype(node) != torch.float32:
            editor.refused(
                node, f"its weights are {held.dtype} {list(held.shape)}: panels are of float32 matrices"
            )
            continue
        experts, n, k = held.shape
        if weight not in made:
            panels = torch.stack([pack_dense(matrix) for matrix in held.detach()])
            made[weight] = editor.constant(panels, constant_name(editor, weight, "panels"))
        x, expert, bias = (argument(node, name) for name in ("input", "expert", "bias"))
        new = editor.call(linear_grouped_dense.overload, x, expert, made[weight], bias, n, k, like=node)
        editor.replace(node, new)
        editor.applied(new, f"float32 {experts} x {n} x {k} in panels")
