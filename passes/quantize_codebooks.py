"""Linears read a weight as additive codes: `W → dequantize_codebook(codes, codebooks, scale)`.

    y = x W^T + b   →   y = x (scale sum_m C_m[c_m])^T + b

for the layers whose recipe says `format: codebook` (fitted to the weights here, `codebooks.py`), or for which ready
codes are given (`import_codebooks`, in the shapes that AQLM publishes). LOSSY: the relative error of each layer is
reported; of imported codes it is the distance from the captured weight, which a fine-tuned checkpoint may well have.
Refused: what `layers.selected` refuses; imported codes for a module that is no linear, or of another size, are an
error that lists all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..compiler.dialect import dequantize_codebook
from ..compiler.dialect.packing_codebook import CodebookMatrix, from_aqlm
from ..compiler.editor import Editor
from ..compiler.errors import InputError, near_misses
from ..compiler.graph import shape
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe, WeightFormat
from .code_ranges import relative_error
from .codebooks import fit_codebooks
from .layers import Layer, constant_name, layers, packed_bytes, set_argument
from .quantize_weights import Progress, Quantized, quantize_selected


@define_pass(Guarantee.LOSSY)
def quantize_codebooks(editor: Editor, *, recipe: Recipe, progress: Progress | None = None) -> None:
    """Fit codebooks to the weights that the recipe says. Raises InputError for NaN or infinite weights."""
    quantize_selected(editor, recipe, "weights", ("codebook",), _quantize, progress)


@define_pass(Guarantee.LOSSY)
def import_codebooks(editor: Editor, *, matrices: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Let linears read ready codes: module path → (codes, codebooks, scales) as in `packing_codebook.from_aqlm`.

    Raises InputError that lists every path that is no linear, and every matrix that does not fit its layer.
    """
    found: dict[str, list[Layer]] = {}
    for layer in layers(editor):
        if layer.kind == "weights":
            found.setdefault(layer.path, []).append(layer)
    problems, made = [], {}
    for path, tensors in matrices.items():
        if path not in found:
            hint = near_misses(path, found)
            problems.append(f"{path!r} is no linear" + (f" ({hint})" if hint else ""))
            continue
        n, k = (int(size) for size in shape(found[path][0].weight) or ())
        try:
            made[path] = from_aqlm(*tensors, k=k)
        except InputError as problem:
            problems.append(f"{path!r}: {str(problem).splitlines()[0]}")
            continue
        if made[path].codes.shape[0] != n:
            problems.append(f"{path!r}: codes of {made[path].codes.shape[0]} rows for {n} output features")
    if problems:
        raise InputError(
            "Codebooks do not fit the model", where="; ".join(problems), expected=f"{len(found)} linears"
        )
    for path, matrix in made.items():
        for layer in found[path]:
            weight = editor.tensor(layer.weight)
            call = _call(editor, matrix, layer)
            error = None if weight is None else relative_error(weight, matrix.dequantized())
            facts = _facts(layer, matrix, error)
            set_argument(layer.node, "weight", call)
            editor.applied(layer.node, f"weight from given codes {matrix.layout}", **facts)


def _quantize(editor: Editor, layer: Layer, chosen: WeightFormat) -> Quantized:
    weight = editor.tensor(layer.weight)
    assert weight is not None
    matrix = fit_codebooks(weight, chosen.codebooks, chosen.code_bits)
    facts = _facts(layer, matrix, relative_error(weight, matrix.dequantized()))
    facts["bytes_after"] = packed_bytes(layer.kind, tuple(weight.shape), chosen)
    what = f"weight to codebooks {matrix.layout}, relative error {facts['weight_error']:.2e}"
    return _call(editor, matrix, layer), facts, what


def _call(editor: Editor, matrix: CodebookMatrix, layer: Layer) -> fx.Node:
    parts = [
        editor.constant(tensor, constant_name(editor, layer.weight, part))
        for part, tensor in (
            ("codes", matrix.codes),
            ("codebooks", matrix.codebooks),
            ("scale", matrix.scale),
        )
    ]
    return editor.call(dequantize_codebook.overload, *parts, matrix.k, like=layer.node)


def _facts(layer: Layer, matrix: CodebookMatrix, error: float | None) -> dict[str, Any]:
    n, _, count = matrix.codes.shape
    code_bits: Literal[8, 16] = 8 if matrix.codes.dtype == torch.uint8 else 16
    chosen = WeightFormat(format="codebook", codebooks=count, code_bits=code_bits)
    return {
        "kind": layer.kind,
        "format": f"codebook {matrix.layout}",
        "shape": [n, matrix.k],
        "bits": count * code_bits / 8,
        "group_size": 8,
        "symmetric": True,
        "bytes_before": 4 * n * matrix.k,
        "bytes_after": packed_bytes(layer.kind, (n, matrix.k), chosen),
        "weight_error": error,
    }
