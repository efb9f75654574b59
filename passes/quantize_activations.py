"""Inputs of quantized layers are rounded to unsigned 8 or 4 bits: `x → quantize_dequantize(x)`.

    x ~ s (u - z),   u = clamp(round(x / s) + z, 0, 2^bits - 1)

LOSSY: inside the range the error is at most s/2. Dynamic: the pair (s, z) follows each token (each sample for
convolutions). Static: one pair for the tensor, from calibration data. One node serves all readers of a value
that want the same, so q, k and v read one quantized activation. Convolutions always read 8 bits, as their packed form
quantizes inside.

Only inputs of layers whose weights are quantized, or are chosen to be by the recipe, are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..compiler.dialect import quantize_dequantize
from ..compiler.editor import Editor
from ..compiler.errors import InputError
from ..compiler.graph import dtype
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import ActivationFormat, Kind, Recipe
from .calibrate import Histogram, calibrate, static_params
from .layers import Layer, is_call_of, layers, quantized_weight, selected, set_argument

_KINDS: tuple[Kind, ...] = ("weights", "convolutions")


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
    wanted: dict[tuple[fx.Node, str, ActivationFormat], list[Layer]] = {}
    for layer in _quantized_layers(editor, recipe):
        form = recipe.format_for(layer.path, "activations")
        if form.mode == "float" or is_call_of(layer.input, quantize_dequantize.overload):
            continue
        if dtype(layer.input) != torch.float32:
            editor.refused(layer.node, f"its input is {dtype(layer.input)}, not float32")
            continue
        if layer.kind == "convolutions":
            form = form.model_copy(update={"bits": 8})
        granularity = "sample" if form.mode == "dynamic" and layer.kind == "convolutions" else "token"
        wanted.setdefault((layer.input, granularity, form), []).append(layer)
    ranges = _measure(editor, wanted, recipe, calibration, progress)
    for (x, granularity, form), readers in wanted.items():
        facts: dict[str, Any] = {"mode": form.mode, "bits": form.bits, "readers": [r.path for r in readers]}
        params = None
        if form.mode == "static":
            low, high = ranges[x.name].range(form.percentile, form.range, form.bits)
            params = editor.constant(
                static_params(low, high, form.bits), f"{readers[0].node.name}_input_params"
            )
            facts |= {
                "low": low,
                "high": high,
                "seen_low": ranges[x.name].low,
                "seen_high": ranges[x.name].high,
            }
        quantized = editor.call(
            quantize_dequantize.overload,
            x,
            params,
            granularity,
            form.bits,
            like=readers[0].node,
            before=_after(x),
        )
        for reader in readers:
            set_argument(reader.node, "input", quantized)
        per = (
            f"static in [{facts['low']:.4g}, {facts['high']:.4g}]"
            if params is not None
            else f"per {granularity}"
        )
        editor.applied(
            readers[0].node, f"input to uint{form.bits}, {per}, for {len(readers)} layers", **facts
        )


def _quantized_layers(editor: Editor, recipe: Recipe) -> list[Layer]:
    chosen = {
        layer.node for kind in _KINDS for layer, _, reason in selected(editor, recipe, kind) if reason is None
    }
    found = [layer for layer in layers(editor) if layer.kind in _KINDS]
    return [layer for layer in found if layer.node in chosen or quantized_weight(layer) is not None]


def _measure(
    editor: Editor,
    wanted: dict[tuple[fx.Node, str, ActivationFormat], list[Layer]],
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
