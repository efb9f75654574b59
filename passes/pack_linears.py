"""Quantized linears become packed ones, in the layout that kernels read.

    linear(quantize_dequantize(x), dequantize_weight(w)) + b → linear_packed(quantize_activation(x), pack(w), b)
    linear(x, dequantize_weight(w)) + b                      → linear_packed_float(x, pack(w), b)
    the same on dequantize_outliers(w, S)                    → linear_outliers, linear_outliers_float

REAL: codes and scales are kept bit for bit (`packing.pack_linear` refuses scales that it cannot store); the
sums are the same ones multiplied out, so only the order of roundings differs. Linears that read one value
share one quantized activation, with `align` the largest that they need, as long as they agree on the padded
number of inputs; otherwise each group of readers has its own. Linears with one dequantized weight share the
packed bytes.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ..compiler.dialect import (
    linear_outliers,
    linear_outliers_float,
    linear_packed,
    linear_packed_float,
    quantize_activation,
    quantize_dequantize,
)
from ..compiler.dialect.outlier_packing import PackedOutliers, pack_outliers
from ..compiler.dialect.packing import PackedLinear, alignment, ceil_to, pack_linear
from ..compiler.editor import Editor
from ..compiler.graph import argument
from ..compiler.passes import Guarantee, define_pass
from .layers import Layer, QuantizedWeight, codes_of, constant_name, is_call_of, layers, narrowest_bits


@define_pass(Guarantee.REAL)
def pack_linears(editor: Editor) -> None:
    """Pack all linears whose weight is a `dequantize_weight` or `dequantize_outliers` of constants."""
    packable = packable_layers(editor, grouped=False)
    activations = packed_activations(editor, packable)
    packed: dict[fx.Node, tuple[PackedLinear, PackedOutliers | None, dict[str, fx.Node]]] = {}
    for layer, quantized in packable:
        if layer.weight not in packed:
            packed[layer.weight] = _pack(editor, quantized)
        matrix, outliers, nodes = packed[layer.weight]
        width = width_of(layer)
        bias = argument(layer.node, "bias")
        weights: tuple[fx.Node | None, ...] = (
            nodes["packed"],
            nodes["packed_scale"],
            nodes.get("packed_zero"),
        )
        attributes = (
            matrix.n,
            matrix.k,
            matrix.bits,
            matrix.group_size,
            matrix.scale_multiplier,
            "none",
            False,
        )
        rest = (bias, None, *attributes)
        beside, size = "", matrix.nbytes
        targets = (linear_packed.overload, linear_packed_float.overload)
        if outliers is not None:
            entries = (nodes[f"outlier_{part}"] for part in ("places", "values", "offsets"))
            rest = (bias, None, *entries, *attributes, outliers.multiplier)
            targets = (linear_outliers.overload, linear_outliers_float.overload)
            beside, size = f", {outliers.nbytes} bytes of outliers", size + outliers.nbytes
        if layer.node in activations:
            u, params = activations[layer.node]
            weights = (*weights, nodes["packed_wsum"])
            new = editor.call(targets[0], u, params, *weights, *rest, like=layer.node)
        else:
            new = editor.call(targets[1], layer.input, *weights, *rest, like=layer.node)
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"int{matrix.bits} {matrix.n} x {matrix.k} packed{beside}",
            bits=matrix.bits,
            group_size=matrix.group_size,
            bytes_after=size,
            activations=width,
        )


def packable_layers(editor: Editor, grouped: bool) -> list[tuple[Layer, QuantizedWeight]]:
    """Linears (grouped: those of experts) whose codes can be packed; others with codes are refused with the reason."""
    found: list[tuple[Layer, QuantizedWeight]] = []
    for layer in layers(editor):
        quantized = (
            codes_of(editor, layer) if layer.kind == "weights" and layer.is_grouped == grouped else None
        )
        if quantized is None:
            continue
        reason = quantized if isinstance(quantized, str) else reason_against(layer)
        if isinstance(quantized, str) or reason is not None:
            editor.refused(layer.node, reason or "")
        else:
            found.append((layer, quantized))
    return found


def reason_against(layer: Layer) -> str | None:
    """Why a linear with a quantized weight cannot be packed, or None."""
    if is_call_of(layer.input, quantize_dequantize.overload):
        granularity = argument(layer.input, "granularity")
        if argument(layer.input, "params") is None and granularity != "token":
            return f"its input is quantized per {granularity}; packed linears take a pair per token or one for all"
    return None


def packed_activations(
    editor: Editor, packable: list[tuple[Layer, QuantizedWeight]]
) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """For each linear on a quantized input: the nodes of its codes and of their pairs."""
    groups: dict[tuple[fx.Node, int], list[tuple[Layer, int]]] = {}
    for layer, quantized in packable:
        if is_call_of(layer.input, quantize_dequantize.overload):
            align = alignment(quantized.group_size)
            groups.setdefault((layer.input, ceil_to(quantized.codes.shape[-1], align)), []).append(
                (layer, align)
            )
    result: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for (rounded, _), readers in groups.items():
        x, params, bits = (argument(rounded, name) for name in ("x", "params", "bits"))
        align = max(align for _, align in readers)
        both = editor.call(quantize_activation.overload, x, params, align, None, None, bits, like=rounded)
        u, pair = (editor.call(operator.getitem, both, i, like=rounded, before=rounded) for i in (0, 1))
        result.update({layer.node: (u, pair) for layer, _ in readers})
    return result


def width_of(layer: Layer) -> str:
    """What the layer reads, for reports."""
    rounded = is_call_of(layer.input, quantize_dequantize.overload)
    return f"uint{argument(layer.input, 'bits')}" if rounded else "float"


def _pack(
    editor: Editor, quantized: QuantizedWeight
) -> tuple[PackedLinear, PackedOutliers | None, dict[str, fx.Node]]:
    bits = narrowest_bits(quantized, (2, 3, 4))
    matrix = pack_linear(quantized.codes, quantized.scale, quantized.zero, bits, quantized.group_size)
    tensors: dict[str, Tensor | None] = {
        "packed": matrix.weight,
        "packed_scale": matrix.scale,
        "packed_zero": matrix.zero,
        "packed_wsum": matrix.wsum,
    }
    outliers = None
    if quantized.outliers is not None:
        held = quantized.outliers
        outliers = pack_outliers(held.places, held.values, matrix.k, held.multiplier)
        sums = (held.values.double() * held.multiplier).sum(1)
        tensors["packed_wsum"] = matrix.wsum.double().index_add(0, torch.arange(matrix.n), sums).float()
        tensors |= {
            "outlier_places": outliers.places,
            "outlier_values": outliers.values,
            "outlier_offsets": outliers.offsets,
        }
    nodes = {
        part: editor.constant(tensor, constant_name(editor, quantized.node, part))
        for part, tensor in tensors.items()
        if tensor is not None
    }
    return matrix, outliers, nodes
