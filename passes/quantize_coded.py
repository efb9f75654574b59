"""Linears read a weight as codes of a table or of small floats: `W → dequantize_coded(codes, scale, ...)`.

    y = x W^T + b   →   y = x (value[c] scale multiplier)^T + b

for the layers whose recipe names such a format (nf4, table4, FP8, MX, NVFP4); integers are `quantize_weights`' work.
LOSSY: each weight moves to the nearest value of the format at its group's scale (`code_ranges.py`); the relative
error of each layer is reported. Linears that share one weight and one format share its codes. Refused: what
`layers.selected` refuses (computed weights, other dtypes, other readers, matrices that are smaller in float).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.dialect import dequantize_coded
from ..compiler.dialect.element_formats import element_format
from ..compiler.dialect.packing_coded import CodedMatrix
from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import GROUP_SIZES, Recipe, WeightFormat
from .code_ranges import quantize_codes, relative_error
from .layers import Layer, constant_name, packed_bytes
from .quantize_weights import Progress, Quantized, quantize_selected


@define_pass(Guarantee.LOSSY)
def quantize_coded(editor: Editor, *, recipe: Recipe, progress: Progress | None = None) -> None:
    """Quantize weights of linears to the recipe's formats of codes. Raises InputError for NaN or infinite weights."""
    quantize_selected(editor, recipe, "weights", tuple(GROUP_SIZES), _quantize, progress)


def coded_call(editor: Editor, matrix: CodedMatrix, weight: fx.Node, like: fx.Node) -> fx.Node:
    """A `dequantize_coded` of new constants, named after `weight`, in front of `like`."""
    tensors = {
        "codes": matrix.codes,
        "scale": matrix.scale,
        "multiplier": torch.tensor(matrix.multiplier),
        "table": matrix.table,
    }
    parts = {
        part: None if tensor is None else editor.constant(tensor, constant_name(editor, weight, part))
        for part, tensor in tensors.items()
    }
    return editor.call(
        dequantize_coded.overload, *parts.values(), matrix.format, matrix.group_size, like=like
    )


def _quantize(editor: Editor, layer: Layer, chosen: WeightFormat) -> Quantized:
    weight = editor.tensor(layer.weight)
    assert weight is not None
    matrix = quantize_codes(weight, chosen.format, chosen.group_size, chosen.range)
    facts: dict[str, Any] = {
        "kind": layer.kind,
        "format": chosen.format,
        "shape": list(weight.shape),
        "bits": element_format(chosen.format).bits,
        "group_size": chosen.group_size,
        "symmetric": True,
        "range": chosen.range,
        "bytes_before": weight.numel() * weight.element_size(),
        "bytes_after": packed_bytes(layer.kind, tuple(weight.shape), chosen),
        "weight_error": relative_error(weight, matrix.dequantized()),
    }
    per = f"groups of {chosen.group_size}" if chosen.group_size else "one scale a row"
    what = f"weight to {chosen.format}, {per}, relative error {facts['weight_error']:.2e}"
    return coded_call(editor, matrix, layer.weight, layer.node), facts, what
