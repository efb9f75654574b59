"""Linears on codes of tables and small floats become packed ones, in the layout that kernels read.

    linear(x, dequantize_coded(codes, scale, multiplier, table)) + b → linear_coded(x, pack(codes), scale, table, b)

REAL: codes and scales are kept bit for bit; only the order of roundings differs. x stays in float: a quantizer in
front of it, which recipes do not ask for with these formats, would stay where it is. Linears with one dequantized
weight share the packed bytes. Refused: codes that are computed in the graph, results that are not float32.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.dialect import dequantize_coded, linear_coded
from ..compiler.dialect.packing_coded import CodedMatrix, PackedCoded, pack_coded
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype
from ..compiler.passes import Guarantee, define_pass
from .layers import Layer, constant_name, is_call_of, layers


@define_pass(Guarantee.REAL)
def pack_coded_linears(editor: Editor) -> None:
    """Pack all linears whose weight is a `dequantize_coded` of constants."""
    packed: dict[fx.Node, tuple[PackedCoded, tuple[fx.Node | None, ...]]] = {}
    for layer in layers(editor):
        if layer.kind != "weights" or not is_call_of(layer.weight, dequantize_coded.overload):
            continue
        matrix = _matrix(editor, layer)
        if isinstance(matrix, str):
            editor.refused(layer.node, matrix)
            continue
        if layer.weight not in packed:
            packed[layer.weight] = _pack(editor, layer.weight, matrix)
        stored, tensors = packed[layer.weight]
        attributes = (stored.n, stored.k, stored.format, stored.group_size, stored.scale_multiplier)
        bias = argument(layer.node, "bias")
        new = editor.call(
            linear_coded.overload,
            layer.input,
            *tensors,
            bias,
            None,
            *attributes,
            "none",
            False,
            like=layer.node,
        )
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"{stored.format} {stored.n} x {stored.k} packed",
            format=stored.format,
            group_size=stored.group_size,
            bytes_after=stored.nbytes,
            activations="float",
        )


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
