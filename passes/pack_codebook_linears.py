"""Linears on additive codes become packed ones, in the layout that kernels read.

    linear(x, dequantize_codebook(codes, codebooks, scale)) + b → linear_codebook(x, pack(codes), codebooks, scale, b)

REAL: codes, codebooks (float16) and scales are kept bit for bit; only the order of roundings differs. x stays in float.
Linears with one dequantized weight share the packed bytes. Refused: codes that are computed in the graph, results that
are not float32.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.dialect import dequantize_codebook, linear_codebook
from ..compiler.dialect.packing_codebook import CodebookMatrix, PackedCodebook, pack_codebook
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype
from ..compiler.passes import Guarantee, define_pass
from .layers import Layer, constant_name, is_call_of, layers


@define_pass(Guarantee.REAL)
def pack_codebook_linears(editor: Editor) -> None:
    """Pack all linears whose weight is a `dequantize_codebook` of constants."""
    packed: dict[fx.Node, tuple[PackedCodebook, list[fx.Node]]] = {}
    for layer in layers(editor):
        if layer.kind != "weights" or not is_call_of(layer.weight, dequantize_codebook.overload):
            continue
        matrix = _matrix(editor, layer)
        if isinstance(matrix, str):
            editor.refused(layer.node, matrix)
            continue
        if layer.weight not in packed:
            packed[layer.weight] = _pack(editor, layer.weight, matrix)
        stored, tensors = packed[layer.weight]
        bias = argument(layer.node, "bias")
        rest = (bias, None, stored.n, stored.k, stored.layout, "none", False)
        new = editor.call(linear_codebook.overload, layer.input, *tensors, *rest, like=layer.node)
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"codebooks {stored.layout} {stored.n} x {stored.k} packed",
            format=f"codebook {stored.layout}",
            bytes_after=stored.nbytes,
            activations="float",
        )


def _matrix(editor: Editor, layer: Layer) -> CodebookMatrix | str:
    codes, codebooks, scale = (
        editor.tensor(argument(layer.weight, name)) for name in ("codes", "codebooks", "scale")
    )
    if codes is None or codebooks is None or scale is None:
        return "its codes are computed in the graph, not constants"
    if dtype(layer.node) != torch.float32:
        return f"its result is {dtype(layer.node)}, not float32"
    return CodebookMatrix(codes, codebooks, scale, argument(layer.weight, "k"))


def _pack(editor: Editor, weight: fx.Node, matrix: CodebookMatrix) -> tuple[PackedCodebook, list[fx.Node]]:
    stored = pack_codebook(matrix)
    codes = argument(weight, "codes")
    parts = (
        ("packed", stored.weight),
        ("packed_codebooks", stored.codebooks),
        ("packed_scale", stored.scale),
    )
    return stored, [editor.constant(tensor, constant_name(editor, codes, part)) for part, tensor in parts]
