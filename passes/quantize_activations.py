"""Inputs of quantized layers are rounded to unsigned 8 or 4 bits, or to FP8: `x → quantize_dequantize(x)`.

    x ~ s (u - z),   u = clamp(round(x / s) + z, 0, 2^bits - 1)
    x ~ s value[c],  c = e4m3(x / s)                                  format e4m3: `quantize_dequantize_fp8(x)`

LOSSY: inside the range the error is at most s/2, of FP8 2^-4 of the value. Dynamic: the pair (s, z) follows each token
(each sample for convolutions). Static: one pair for the tensor, from calibration data. One node serves all readers of
a value that want the same, so q, k and v read one quantized activation. Convolutions always read integers of 8 bits,
as their packed form quantizes inside.

Only inputs of layers whose weights are quantized, or are chosen to be by the recipe, are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..compiler.dialect import dequantize_coded, quantize_dequantize, quantize_dequantize_fp8
from ..compiler.dialect.linear_fp8 import WEIGHT_FORMATS
from ..compiler.editor import Editor
from ..compiler.errors import InputError
from ..compiler.graph import argument, dtype
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import ActivationFormat, Kind, Recipe
from .calibrate import Histogram, calibrate, static_params, static_scale
from .layers import (
    ROUNDERS,
    Layer,
    activation_format,
    is_call_of,
    layers,
    quantized_weight,
    selected,
    set_argument,
)

_KINDS: tuple[Kind, ...] = ("weights", "convolutions")
_Key = tuple[fx.Node, str, ActivationFormat]
"""A value, the granularity of its pairs, and its format."""


@define_pass(Guarantee.LOSSY)
def quantize_activations(
    editor: Editor,
    *,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Quantize activations as the recipe says; calibration batches as in `calibrate`, needed for static ranges.

    Raises InputError where they are missing or do not fit the program.
    """
    wanted: dict[_Key, list[Layer]] = {}
    for layer in _quantized_layers(editor, recipe):
        form = activation_format(recipe, layer)
        if form.mode == "float" or is_call_of(layer.input, *ROUNDERS):
            continue
        if dtype(layer.input) != torch.float32:
            editor.refused(layer.node, f"its input is {dtype(layer.input)}, not float32")
            continue
        granularity = "sample" if form.mode == "dynamic" and layer.kind == "convolutions" else "token"
        wanted.setdefault((layer.input, granularity, form), []).append(layer)
    ranges = _measure(editor, wanted, recipe, calibration, progress)
    for key, readers in wanted.items():
        _round(editor, key, readers, ranges.get(key[0].name))


def _round(editor: Editor, key: _Key, readers: list[Layer], histogram: Histogram | None) -> None:
    """Put one quantizer between a value and its readers; histogram: of its values, where the range is static."""
    x, granularity, form = key
    fp8 = form.format == "e4m3"
    name = "e4m3" if fp8 else f"uint{form.bits}"
    facts: dict[str, Any] = {
        "mode": form.mode,
        "format": form.format,
        "bits": 8 if fp8 else form.bits,
        "readers": [r.path for r in readers],
    }
    params, per = None, f"per {granularity}"
    if histogram is not None:
        if fp8:
            high = histogram.largest(form.percentile, form.range)
            low, held = -high, static_scale(high)
        else:
            low, high = histogram.range(form.percentile, form.range, form.bits)
            held = static_params(low, high, form.bits)
        params = editor.constant(held, f"{readers[0].node.name}_input_params")
        facts |= {"low": low, "high": high, "seen_low": histogram.low, "seen_high": histogram.high}
        per = f"static in [{low:.4g}, {high:.4g}]"
    rest = () if fp8 else (granularity, form.bits)
    overload = quantize_dequantize_fp8.overload if fp8 else quantize_dequantize.overload
    quantized = editor.call(overload, x, params, *rest, like=readers[0].node, before=_after(x))
    for reader in readers:
        set_argument(reader.node, "input", quantized)
    editor.applied(readers[0].node, f"input to {name}, {per}, for {len(readers)} layers", **facts)


def _quantized_layers(editor: Editor, recipe: Recipe) -> list[Layer]:
    chosen = {
        layer.node for kind in _KINDS for layer, _, reason in selected(editor, recipe, kind) if reason is None
    }
    found = [layer for layer in layers(editor) if layer.kind in _KINDS]
    return [layer for layer in found if layer.node in chosen or _holds_codes(layer, recipe)]


def _holds_codes(layer: Layer, recipe: Recipe) -> bool:
    """Whether the weight already is codes that meet what the recipe makes of the input."""
    if activation_format(recipe, layer).format == "int":
        return quantized_weight(layer) is not None
    coded = is_call_of(layer.weight, dequantize_coded.overload)
    return coded and argument(layer.weight, "format") in WEIGHT_FORMATS


def _measure(
    editor: Editor,
    wanted: dict[_Key, list[Layer]],
    recipe: Recipe,
    calibration: Iterable[Any] | None,
    progress: Callable[[int, int | None], None] | None,
) -> dict[str, Histogram]:
    names = {
        x.name: "sample" if readers[0].kind == "convolutions" else "token"
        for (x, _, form), readers in wanted.items()
        if form.mode == "static"
    }
    if not names:
        return {}
    if calibration is None:
        raise InputError(
            "The recipe has static activation ranges, which need calibration data",
            where=f"recipe {recipe.name!r}",
            expected="calibration: an iterable of batches of inputs",
            hint="pass calibration=..., or use activations: {mode: dynamic}",
        )
    return calibrate(editor.program, names, calibration, progress)


def _after(x: fx.Node) -> fx.Node:
    """The first node behind x at which a call may be inserted (placeholders and constants stay in front)."""
    node = x.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node
