"""Linears read a weight rounded to 2, 3, 4 or 8 bits: `W → dequantize_weight(codes, scale, zero)`.

    y = x W^T + b   →   y = x (scale (w - zero))^T + b
    W [E, N, K]     →   the same of a matrix for each expert (`linear_grouped`), its rows one above the other
    with outliers   →   y = x (scale (w - zero) + S)^T + b      S: a few float16 entries (`outliers.py`)

LOSSY: each weight moves by at most half a step, or further where the range search clips (`ranges.py`) or GPTQ lets
it make up for others (`solve_gptq.py`, `solver: gptq`; each expert by the rows that chose it); the relative error of
each layer is reported. Linears that share one weight and one format share its codes; a weight tied to an embedding
gets codes of its own here, as the two are packed differently.

Refused: weights that are computed, not two-dimensional, not float32, also read in float by another operator,
or so small that the padded layout would be larger. Constants that no packed operator can read are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from ..compiler.dialect import dequantize_outliers, dequantize_weight
from ..compiler.editor import Editor
from ..compiler.errors import InputError
from ..compiler.graph import argument, place_of, shape
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Kind, Recipe
from .layers import (
    DEQUANTIZERS,
    OPERATORS,
    Layer,
    called,
    check_finite,
    constant_name,
    group_size_for,
    is_call_of,
    packed_bytes,
    selected,
    set_argument,
)
from .outliers import Outliers, quantize_with_outliers, wants_outliers
from .ranges import QuantizedMatrix, quantize_matrix
from .solve_gptq import Read, input_products, solve_gptq_of_all

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

Quantized = tuple[fx.Node, dict[str, Any], str]
"""The call that a layer reads its weight from, facts for the report, and what was done in words."""

REPORTED_ELEMENTS = 1024
"""Constants of at least this many elements are listed where nothing can pack them."""


@define_pass(Guarantee.LOSSY)
def quantize_weights(
    editor: Editor,
    *,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Quantize the weights of linears as the recipe says; calibration batches as in `calibrate`, for `solver: gptq`.

    Raises InputError for NaN or infinite weights, and where calibration data is missing or does not fit.
    """
    quantize_kind(editor, recipe, "weights", storable=True, calibration=calibration, progress=progress)
    _list_unpackable(editor, recipe)


def quantize_kind(
    editor: Editor,
    recipe: Recipe,
    kind: Kind,
    *,
    storable: bool,
    calibration: Iterable[Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Replace the weights of selected layers of `kind` by integer codes (shared with embeddings and convolutions)."""
    products = _input_products(editor, recipe, kind, calibration)

    def quantize(editor: Editor, layer: Layer, chosen: Any) -> Quantized:
        product = products.get(layer.weight.name) if _by_gptq(chosen) else None
        call, facts = _quantize(editor, layer, chosen, storable, product)
        return call, facts, _describe(chosen, facts)

    quantize_selected(editor, recipe, kind, ("int",), quantize, progress)


def quantize_selected(
    editor: Editor,
    recipe: Recipe,
    kind: Kind,
    formats: Sequence[str],
    quantize: Callable[[Editor, Layer, Any], Quantized],
    progress: Progress | None,
) -> None:
    """Let every layer of `kind` that the recipe gives one of `formats` read its weight from what `quantize` makes.

    Raises InputError that names every layer whose weight holds NaN or infinity.
    """
    chosen: list[tuple[Layer, Any]] = []
    for layer, chosen_format, reason in selected(editor, recipe, kind):
        if getattr(chosen_format, "format", "int") not in formats:
            continue
        if reason is None:
            chosen.append((layer, chosen_format))
        else:
            editor.refused(layer.node, reason)
    check_finite(editor, [layer for layer, _ in chosen])
    made: dict[tuple[fx.Node, Any], Quantized] = {}
    for done, (layer, chosen_format) in enumerate(chosen):
        key = (layer.weight, chosen_format)
        shared = key in made
        if not shared:
            made[key] = quantize(editor, layer, chosen_format)
        call, facts, what = made[key]
        tied = [user for user in layer.weight.users if OPERATORS.get(user.target) not in (None, kind)]
        set_argument(layer.node, "weight", call)
        if shared:
            nothing = {"bytes_before": 0, "bytes_after": 0}
            editor.applied(
                layer.node, "shares the codes of a layer with the same weight", **{**facts, **nothing}
            )
            continue
        note = (
            f"; tied with {place_of(tied[0]).module or tied[0].name}, which keeps its own copy"
            if tied
            else ""
        )
        editor.applied(layer.node, what + note, **facts)
        if progress is not None:
            progress(done + 1, len(chosen))


def _by_gptq(chosen: Any) -> bool:
    return getattr(chosen, "solver", "nearest") == "gptq"


def _input_products(
    editor: Editor, recipe: Recipe, kind: Kind, calibration: Iterable[Any] | None
) -> dict[str, Tensor]:
    """H of every weight that GPTQ rounds, by its node's name; a weight with several readers gets that of all inputs."""
    inputs: dict[str, list[Read]] = {}
    for layer, chosen, reason in selected(editor, recipe, kind):
        if reason is None and _by_gptq(chosen):
            inputs.setdefault(layer.weight.name, []).append(_read(layer))
    if not inputs:
        return {}
    if calibration is None:
        raise InputError(
            "The recipe rounds weights by GPTQ, which needs calibration data",
            where=f"recipe {recipe.name!r}",
            expected="calibration: an iterable of batches of inputs",
            hint="pass calibration=..., or use weights: {solver: nearest}",
        )
    return input_products(editor.program, inputs, calibration)


def _read(layer: Layer) -> Read:
    if not layer.is_grouped:
        return Read(layer.input.name)
    return Read(layer.input.name, argument(layer.node, "expert").name, (shape(layer.weight) or (0,))[0])


def _quantize(
    editor: Editor, layer: Layer, chosen: Any, storable: bool, product: Tensor | None
) -> tuple[fx.Node, dict[str, Any]]:
    weight = editor.tensor(layer.weight)
    assert weight is not None
    matrix = weight.flatten(0, 1) if layer.is_grouped else weight
    group_size, symmetric = group_size_for(tuple(matrix.shape), chosen), getattr(chosen, "symmetric", True)
    outliers = None
    if wants_outliers(chosen):
        found, outliers = quantize_with_outliers(matrix, chosen, group_size, storable=storable)
    else:
        found = quantize_matrix(
            matrix,
            bits=chosen.bits,
            group_size=group_size,
            symmetric=symmetric,
            search=chosen.range,
            storable=storable,
        )
    if product is not None:
        found = solve_gptq_of_all(matrix, found, product, bits=chosen.bits, group_size=group_size)
    call = integer_call(editor, layer, found, group_size, outliers)
    facts = {
        "kind": layer.kind,
        "shape": list(weight.shape),
        "bits": chosen.bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "range": chosen.range,
        "solver": "nearest" if product is None else "gptq",
        "bytes_before": weight.numel() * weight.element_size(),
        "bytes_after": packed_bytes(layer.kind, tuple(weight.shape), chosen),
        "weight_error": found.error,
    }
    if outliers is not None:
        facts["outliers"] = outliers.count / max(weight.numel(), 1)
    return call, facts


def integer_call(
    editor: Editor, layer: Layer, found: QuantizedMatrix, group_size: int, outliers: Outliers | None = None
) -> fx.Node:
    """A call in front of the layer that decodes new constants, named after its weight; of experts one behind the other
    in `found`."""
    tensors: dict[str, Tensor | None] = {"codes": found.codes, "scale": found.scale, "zero": found.zero}
    weight = editor.tensor(layer.weight)
    if layer.is_grouped and weight is not None:
        sizes = (weight.shape[0], -1)
        tensors = {part: None if t is None else t.unflatten(0, sizes) for part, t in tensors.items()}
    if outliers is not None:
        tensors |= {"outlier_places": outliers.places, "outlier_values": outliers.values}
    parts = {
        part: editor.constant(tensor, constant_name(editor, layer.weight, part))
        for part, tensor in tensors.items()
        if tensor is not None
    }
    dense = (parts["codes"], parts["scale"], parts.get("zero"))
    if outliers is None:
        return editor.call(dequantize_weight.overload, *dense, group_size, like=layer.node)
    beside = (parts["outlier_places"], parts["outlier_values"], outliers.multiplier)
    return editor.call(dequantize_outliers.overload, *dense, *beside, group_size, like=layer.node)


def _describe(chosen: Any, facts: dict[str, Any]) -> str:
    per = f"groups of {facts['group_size']}" if facts["group_size"] else "one scale a row"
    form = "symmetric" if facts["symmetric"] else "asymmetric"
    by = " by GPTQ" if facts["solver"] == "gptq" else ""
    beside = f", {facts['outliers']:.2%} outliers in float16" if "outliers" in facts else ""
    error = facts["weight_error"]
    return f"weight to int{chosen.bits}{by}, {form}, {per}{beside}, relative error {error:.2e}"


def _list_unpackable(editor: Editor, recipe: Recipe) -> None:
    if recipe.weights is None:
        return
    for node in editor.graph.nodes:
        held = editor.tensor(node)
        if held is None or not held.is_floating_point() or held.dim() < 2 or held.numel() < REPORTED_ELEMENTS:
            continue
        if any(OPERATORS.get(user.target) for user in node.users) or not node.users:
            continue
        if any(is_call_of(user, *DEQUANTIZERS) for user in node.users):
            continue
        reader = next(iter(node.users))
        name = f"{editor.name_of(node)!r} {list(held.shape)}"
        editor.refused(reader, f"the constant {name} is read by {called(reader)}, which has no packed form")
