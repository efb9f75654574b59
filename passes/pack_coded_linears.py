"""Linears on codes of tables and small floats become packed ones, in the layout that kernels read.

    linear(x, dequantize_coded(codes, scale, multiplier, table)) + b → linear_coded(x, pack(codes), scale, table, b)
    linear(quantize_dequantize_fp8(x), the same of FP8)           → linear_fp8(quantize_activation_fp8(x), the same)

REAL: codes and scales are kept bit for bit; only the order of roundings differs. Any other quantizer in front of x,
which recipes do not ask for with these formats, stays where it is. Linears that read one value share its codes as long
as they agree on the padded number of inputs, those with one dequantized weight the packed bytes. Refused: codes that
are computed in the graph, results that are not float32.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..compiler.dialect import (
    dequantize_coded,
    linear_coded,
    linear_fp8,
    quantize_activation_fp8,
    quantize_dequantize_fp8,
)
from ..compiler.dialect.linear_fp8 import WEIGHT_FORMATS
from ..compiler.dialect.packing import alignment, ceil_to
from ..compiler.dialect.packing_coded import CodedMatrix, PackedCoded, pack_coded
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype
from ..compiler.passes import Guarantee, define_pass
from .layers import Layer, constant_name, is_call_of, layers


@define_pass(Guarantee.REAL)
def pack_coded_linears(editor: Editor) -> None:
    """Pack all linears whose weight is a `dequantize_coded` of constants."""
    packed: dict[fx.Node, tuple[PackedCoded, tuple[fx.Node | None, ...]]] = {}
    packable: list[tuple[Layer, PackedCoded, tuple[fx.Node | None, ...]]] = []
    for layer in layers(editor):
        if layer.kind != "weights" or not is_call_of(layer.weight, dequantize_coded.overload):
            continue
        matrix = _matrix(editor, layer)
        if isinstance(matrix, str):
            editor.refused(layer.node, matrix)
            continue
        if layer.weight not in packed:
            packed[layer.weight] = _pack(editor, layer.weight, matrix)
        packable.append((layer, *packed[layer.weight]))
    activations = _quantize_activations(editor, packable)
    for layer, stored, (weight, scale, table) in packable:
        attributes = (
            stored.n,
            stored.k,
            stored.format,
            stored.group_size,
            stored.scale_multiplier,
            "none",
            False,
        )
        rest = (argument(layer.node, "bias"), None, *attributes)
        if layer.node in activations:
            u, params = activations[layer.node]
            new = editor.call(linear_fp8.overload, u, params, weight, scale, *rest, like=layer.node)
        else:
            new = editor.call(
                linear_coded.overload, layer.input, weight, scale, table, *rest, like=layer.node
            )
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"{stored.format} {stored.n} x {stored.k} packed",
            format=stored.format,
            group_size=stored.group_size,
            bytes_after=stored.nbytes,
            activations="e4m3" if layer.node in activations else "float",
        )


def _quantize_activations(
    editor: Editor, packable: list[tuple[Layer, PackedCoded, tuple[fx.Node | None, ...]]]
) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """For each linear of FP8 on an FP8 input: the nodes of its codes and of their scales."""
    groups: dict[tuple[fx.Node, int], list[tuple[Layer, int]]] = {}
    for layer, stored, _ in packable:
        if stored.format in WEIGHT_FORMATS and is_call_of(layer.input, quantize_dequantize_fp8.overload):
            align = alignment(stored.group_size)
            groups.setdefault((layer.input, ceil_to(stored.k, align)), []).append((layer, align))
    result: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for (rounded, _), readers in groups.items():
        x, params = (argument(rounded, name) for name in ("x", "params"))
        align = max(align for _, align in readers)
        both = editor.call(quantize_activation_fp8.overload, x, params, align, None, None, [], like=rounded)
        u, scales = (editor.call(operator.getitem, both, i, like=rounded, before=rounded) for i in (0, 1))
        result.update({layer.node: (u, scales) for layer, _ in readers})
    return result


def _matrix(editor: Editor, layer: Layer) -> CodedMatrix | str:
    node = layer.weight
    codes, scale, multiplier, table = (
        editor.tensor(argument(node, name)) for name in ("codes", "scale", "multiplier", "table")
    )
    absent = argument(node, "table") is None
    if codes is None or scale is None or multiplier is None or (table is None and not absent):
        return "its codes are computed in the graph, not constants"
    if dtype(layer.node) != torch.float32:
        return f"its result is {dtype(layer.node)}, not float32"
    form, group_size = argument(node, "format"), argument(node, "group_size")
    return CodedMatrix(codes, scale, float(multiplier), table, form, group_size)


def _pack(
    editor: Editor, weight: fx.Node, matrix: CodedMatrix
) -> tuple[PackedCoded, tuple[fx.Node | None, ...]]:
    stored = pack_coded(matrix)
    codes = argument(weight, "codes")
    tensors = tuple(
        editor.constant(tensor, constant_name(editor, codes, part))
        for part, tensor in (("packed", stored.weight), ("packed_scale", stored.scale))
    )
    return stored, (*tensors, argument(weight, "table"))
