"""Which layers of a graph can be quantized, and which the recipe chooses: shared by all `quantize_*` passes.

A layer is a call of an operator with a packed form and the constant weight that it reads. Layers are found
by operator and edges; module paths only serve the recipe's globs and the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import (
    dequantize_codebook,
    dequantize_coded,
    dequantize_outliers,
    dequantize_weight,
    linear_grouped,
    quantize_dequantize,
    quantize_dequantize_fp8,
)
from ..compiler.dialect.element_formats import element_format
from ..compiler.dialect.outlier_packing import LARGEST_K, outlier_bytes
from ..compiler.dialect.packing import LANES, alignment, ceil_to, code_range, zeros_fit
from ..compiler.dialect.packing_codebook import GROUP
from ..compiler.dialect.packing_coded import scale_dtype
from ..compiler.editor import Editor
from ..compiler.errors import InputError, RecipeError
from ..compiler.graph import argument, dtype, kept_exact, module_path, place_of, shape
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import ActivationFormat, Kind, Recipe, WeightFormat
from .outliers import Outliers, most_outliers, wants_outliers

aten = torch.ops.aten

OPERATORS: dict[object, Kind] = {
    aten.linear.default: "weights",
    linear_grouped.overload: "weights",
    aten.embedding.default: "embeddings",
    aten.conv1d.default: "convolutions",
    aten.conv1d.padding: "convolutions",
    aten.conv2d.default: "convolutions",
    aten.conv2d.padding: "convolutions",
    aten.conv3d.default: "convolutions",
    aten.conv_transpose1d.default: "convolutions",
    aten.conv_transpose2d.input: "convolutions",
    aten.convolution.default: "convolutions",
}
DEQUANTIZERS = (
    dequantize_weight.overload,
    dequantize_outliers.overload,
    dequantize_coded.overload,
    dequantize_codebook.overload,
)
"""What a quantized weight is read through before it is packed."""
ROUNDERS = (quantize_dequantize.overload, quantize_dequantize_fp8.overload)
"""What a quantized activation is read through before the weights of its readers are packed."""
ATTENTIONS = (aten.scaled_dot_product_attention.default,)
"""Operators whose keys and values a recipe's `kv` is for."""
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)


@dataclass(frozen=True)
class Layer:
    """One call with a packed form. `weight` is the node of its weight, `path` its module path."""

    kind: Kind
    node: fx.Node
    weight: fx.Node
    path: str

    @property
    def is_grouped(self) -> bool:
        """Whether its weight `[E, N, K]` is a matrix for each expert."""
        return self.node.target == linear_grouped.overload

    @property
    def input(self) -> fx.Node:
        """The activation (for an embedding: the ids) that the layer reads."""
        name = "indices" if self.kind == "embeddings" else "input"
        found = argument(self.node, name)
        assert isinstance(found, fx.Node)
        return found


def layers(editor: Editor) -> Iterator[Layer]:
    """All layers in graph order, with weights in float or already quantized (not matrices that define an operator)."""
    for node in editor.calls(*OPERATORS):
        weight = argument(node, "weight")
        if kept_exact(weight) is None:
            yield Layer(OPERATORS[node.target], node, weight, module_path(node))


def is_call_of(node: object, *overloads: object) -> bool:
    """Whether `node` is a call of one of the overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in overloads


def quantized_weight(layer: Layer) -> fx.Node | None:
    """The call that makes the layer's weight of integer codes, or None."""
    integers = (dequantize_weight.overload, dequantize_outliers.overload)
    return layer.weight if is_call_of(layer.weight, *integers) else None


@dataclass(frozen=True)
class QuantizedWeight:
    """The constants behind a `dequantize_weight` or `dequantize_outliers`: codes int8, scale `[N, G]`, zero int8
    (float32 where not whole) or None, and outliers.

    node: the `get_attr` node of the codes.
    """

    node: fx.Node
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    outliers: Outliers | None = None


def codes_of(editor: Editor, layer: Layer) -> QuantizedWeight | str | None:
    """The layer's quantized weight; None where it is in float, a reason where it cannot be packed."""
    call = quantized_weight(layer)
    if call is None:
        return None
    node, scale_node, zero_node = call.args[:3]
    group_size = argument(call, "group_size")
    codes, scale, zero = (editor.tensor(n) for n in (node, scale_node, zero_node))
    outliers = None
    if is_call_of(call, dequantize_outliers.overload):
        places, values = (editor.tensor(argument(call, name)) for name in ("places", "values"))
        if places is None or values is None:
            return "its outliers are computed in the graph, not constants"
        outliers = Outliers(places, values, float(argument(call, "multiplier")))
    if (
        not isinstance(node, fx.Node)
        or codes is None
        or scale is None
        or (zero_node is not None and zero is None)
    ):
        return "its codes are computed in the graph, not constants"
    if dtype(layer.node) != torch.float32:
        return f"its result is {dtype(layer.node)}, not float32"
    assert isinstance(group_size, int)
    return QuantizedWeight(node, codes, scale, zero, group_size, outliers)


def narrowest_bits(quantized: QuantizedWeight, widths: Sequence[int]) -> int:
    """The first of `widths` (8 where none) that holds the codes: decided by the codes, so that fused weights need no
    second record. 2 and 3 bits are only for groups whose zero points they can store."""
    for bits in widths:
        low, high = code_range(bits, symmetric=False)
        fits = bool((quantized.codes >= low).all() and (quantized.codes <= high).all())
        if fits and (bits >= 4 or (quantized.group_size and zeros_fit(quantized.zero, bits))):
            return bits
    return 8


def selected(editor: Editor, recipe: Recipe, kind: Kind) -> Iterator[tuple[Layer, Any, str | None]]:
    """(layer, format, reason) for every layer of `kind` still in float whose format is not None.

    reason is None where the layer can be quantized, else says why not.
    """
    for layer in layers(editor):
        if layer.kind == kind and not is_call_of(layer.weight, *DEQUANTIZERS):
            chosen = recipe.format_for(layer.path, kind)
            if chosen is not None:
                yield layer, chosen, _reason_against(editor, recipe, layer, chosen)


def activation_format(recipe: Recipe, layer: Layer) -> ActivationFormat:
    """How the layer's input is stored: as the recipe says, but for convolutions, which read integers of 8 bits."""
    form: ActivationFormat = recipe.format_for(layer.path, "activations")
    return form.model_copy(update={"format": "int", "bits": 8}) if layer.kind == "convolutions" else form


def _reason_against(editor: Editor, recipe: Recipe, layer: Layer, chosen: Any) -> str | None:
    weight = editor.tensor(layer.weight)
    if weight is None:
        return "its weight is computed in the graph, not a constant"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}; kernels quantize float32 models: capture model.float()"
    if dtype(layer.node) != torch.float32:
        return f"its result is {dtype(layer.node)}, not float32"
    if layer.kind == "convolutions":
        against = _reason_against_convolution(recipe, layer)
    else:
        wanted = 3 if layer.is_grouped else 2
        against = (
            None if weight.dim() == wanted else f"its weight has {weight.dim()} dimensions, not {wanted}"
        )
        if layer.is_grouped:
            against = against or _reason_against_grouped(chosen)
        if against is None and wants_outliers(chosen) and weight.shape[1] > LARGEST_K:
            against = (
                f"its weight has {weight.shape[1]} inputs, and places of outliers name at most {LARGEST_K}"
            )
    return against or _other_readers(layer) or _too_small(layer, weight, chosen)


def _reason_against_grouped(chosen: WeightFormat) -> str | None:
    asked = "outliers" if wants_outliers(chosen) else "low_rank" if chosen.low_rank else chosen.format
    if asked not in ("int", "auto"):
        return f"weights of grouped linears have no form with {asked} (int has)"
    return None


def _reason_against_convolution(recipe: Recipe, layer: Layer) -> str | None:
    node = layer.node
    if node.target in _TRANSPOSED or (
        node.target == aten.convolution.default and argument(node, "transposed")
    ):
        return "transposed convolutions have no packed form"
    spatial = len(shape(layer.weight) or ()) - 2
    if spatial not in (1, 2):
        return f"convolutions over {spatial} dimensions have no packed form (1 or 2 do)"
    groups = argument(node, "groups")
    if groups != 1:
        return f"grouped convolutions (groups = {groups}) have no packed form"
    if len(shape(layer.input) or ()) != spatial + 2:
        return "its input has no batch dimension"
    padding = argument(node, "padding")
    dilation = _spread(argument(node, "dilation"), spatial)
    kernel = (shape(layer.weight) or ())[2:]
    if padding == "same" and any((d * (k - 1)) % 2 for k, d in zip(kernel, dilation, strict=True)):
        return "padding='same' with an even kernel pads unevenly, which has no packed form"
    rounded = is_call_of(layer.input, *ROUNDERS)
    if not rounded and recipe.format_for(layer.path, "activations").mode == "float":
        return "its activations stay float by the recipe, and convolutions are quantized together with their inputs"
    return None


def _other_readers(layer: Layer) -> str | None:
    others = [
        user
        for user in layer.weight.users
        if user.op != "call_function"
        or user.target not in OPERATORS
        or argument(user, "weight") is not layer.weight
    ]
    if not others:
        return None
    named = ", ".join(f"{called(user)} ({place_of(user)})" for user in others[:3])
    return f"its weight is also read in float by {named}, so quantizing it would add bytes"


def called(node: fx.Node) -> str:
    """What a node calls, in words."""
    return str(node.target) if node.op == "call_function" else f"the {node.op}"


def group_size_for(sizes: tuple[int, ...], chosen: Any) -> int:
    """Group size of a format on a matrix `[N, K, ...]` of these sizes: 0 where one group of integers would hold the
    whole row, unless the layout only has groups."""
    group_size = int(getattr(chosen, "group_size", 0))
    if getattr(chosen, "format", "int") != "int":
        return group_size
    return group_size if group_size < math.prod(sizes[1:]) or chosen.bits < 4 else 0


def set_argument(node: fx.Node, name: str, new: fx.Node) -> None:
    """Let a call read `new` as the argument called `name` in its schema."""
    if name in node.kwargs:
        node.update_kwarg(name, new)
        return
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    position = [a.name for a in declared].index(name)
    # Arguments that were left at their defaults are spelled out up to this one.
    node.args = (*node.args, *(a.default_value for a in declared[len(node.args) : position + 1]))
    node.update_arg(position, new)


def packed_bytes(kind: Kind, sizes: tuple[int, ...], chosen: Any) -> int:
    """Bytes of a layer's tensors in the packed layout of docs/dialect.md, without its bias; of outliers by standard
    deviations, the most that there can be."""
    if kind == "weights" and len(sizes) == 3:
        return sizes[0] * packed_bytes(kind, sizes[1:], chosen)
    n, k = sizes[0], math.prod(sizes[1:])
    if getattr(chosen, "format", "int") != "int":
        return _coded_bytes(n, k, chosen)
    bits, group_size = chosen.bits, group_size_for(sizes, chosen)
    zeros = not getattr(chosen, "symmetric", True)
    if kind == "embeddings":
        groups = -(-k // group_size) if group_size else 1
        return n * (ceil_to(k, 2) * bits // 8 + groups * (4 + zeros))
    rows, columns = ceil_to(n, LANES), ceil_to(k, alignment(group_size))
    groups = columns // group_size if group_size else 1
    beside = outlier_bytes(n, most_outliers(chosen, k)) if wants_outliers(chosen) else 0
    return rows * (columns * bits // 8 + groups * ((2 if group_size else 4) + zeros) + 4) + beside


def _coded_bytes(n: int, k: int, chosen: WeightFormat) -> int:
    if chosen.format == "codebook":
        code, count = chosen.code_bits // 8, chosen.codebooks
        codes = ceil_to(n, LANES) * ceil_to(k, 32) // GROUP * count * code
        return codes + count * 2**chosen.code_bits * GROUP * 2 + ceil_to(n, LANES) * 4
    form, group_size = element_format(chosen.format), chosen.group_size
    rows, columns = ceil_to(n, LANES), ceil_to(k, alignment(group_size))
    groups = columns // group_size if group_size else 1
    table = 64 if form.name == "table4" else 0
    return rows * (columns * form.bits // 8 + groups * scale_dtype(form, group_size).itemsize) + table


def _too_small(layer: Layer, weight: Tensor, chosen: Any) -> str | None:
    if getattr(chosen, "format", "int") == "prequantized":
        return None  # its width is not known yet
    packed, plain = packed_bytes(layer.kind, tuple(weight.shape), chosen), 4 * weight.numel()
    if packed >= plain:
        return f"too small: its weight {list(weight.shape)} takes {plain} bytes in float and {packed} packed"
    return None


def _spread(sizes: Any, spatial: int) -> list[int]:
    values = [sizes] if isinstance(sizes, int) else list(sizes)
    return values * spatial if len(values) == 1 else values


def convolution_sizes(layer: Layer) -> dict[str, list[int]]:
    """Kernel, stride, padding and dilation of a convolution, one number for each spatial dimension."""
    kernel = [int(s) for s in (shape(layer.weight) or ())[2:]]
    spatial = len(kernel)
    stride, dilation = (_spread(argument(layer.node, name), spatial) for name in ("stride", "dilation"))
    padding = argument(layer.node, "padding")
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    return {"kernel": kernel, "stride": stride, "padding": _spread(padding, spatial), "dilation": dilation}


def check_finite(editor: Editor, chosen: list[Layer]) -> None:
    """Raise InputError that names every layer whose weight holds NaN or infinity."""
    bad = []
    for layer in chosen:
        weight = editor.tensor(layer.weight)
        if weight is not None and not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            name = editor.name_of(layer.weight)
            bad.append(f"{place_of(layer.node)}: {count} of {weight.numel()} values of {name!r}")
    if bad:
        raise InputError(
            "Weights hold NaN or infinity and cannot be quantized",
            where="; ".join(bad),
            hint="check the checkpoint and how it was loaded; a recipe rule can leave a layer in float (weights: null)",
        )


def constant_name(editor: Editor, weight: fx.Node, part: str) -> str:
    """A name for a constant made from `weight`: `a.b.weight` → `a.b.part`.

    Nothing is nested below the name of a tensor, as a module tree cannot hold both.
    """
    name = editor.name_of(weight)
    for ending in (".weight", ".codes"):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}.{part}"
    return f"{name.removesuffix('_codes')}_{part}"


@define_pass(Guarantee.BITWISE)
def check_recipe(editor: Editor, *, recipe: Recipe) -> None:
    """Raise RecipeError where a glob of the recipe matches no layer or attention, or the recipe quantizes none at all.

    Changes nothing. It runs on the canonical form, where layers that were written out (a matmul and an add)
    are layers.
    """
    found = list(layers(editor))
    attentions = [module_path(node) for node in editor.calls(*ATTENTIONS)]
    recipe.check_matches([*(layer.path for layer in found), *attentions])
    kinds: tuple[Kind, ...] = ("weights", "embeddings", "convolutions", "kv")
    asked = [
        kind for kind in kinds if getattr(recipe, kind) or any(getattr(rule, kind) for rule in recipe.layers)
    ]
    done = any(is_call_of(n, *DEQUANTIZERS, *ROUNDERS) for n in editor.graph.nodes)
    chosen = any(x.kind in asked and recipe.format_for(x.path, x.kind) for x in found)
    chosen = chosen or any(recipe.format_for(path, "kv") for path in attentions)
    if asked and not done and not chosen:
        raise RecipeError(
            "The recipe quantizes nothing in this model",
            where=f"recipe {recipe.name!r}: {', '.join(asked)}",
            expected="at least one layer of these kinds (linears, embeddings, convolutions, attentions)",
            got=f"{len(found)} layers: "
            + (", ".join(sorted({x.kind for x in found} | ({"kv"} if attentions else set()))) or "none"),
            hint="use the recipe 'float32' to compile without compression",
        )
