"""Weights that another tool has rounded become the codes that they were rounded to.

    linear(x, W), W on a grid   →   linear(x, dequantize_weight(codes, scale, zero))   or dequantize_coded(...)

for the layers whose recipe says `format: prequantized`: a checkpoint of GPTQ, AWQ, torchao, quanto or bitsandbytes, a
model after quantization-aware training, or a script that rounds weights and stores them in float again. How they were
rounded is read off the values (`grids.py`), so the tool does not matter; constant expressions of codes and scales were
folded to such values before. Of the formats that give a weight back, the narrowest is taken, and of its groups the
largest: int2, int3, int4, MXFP4, NF4, MXFP6, int8, FP8, MXFP8.

LOSSY: codes are those of the tool; scales of groups are stored as float16 times a power of two, which changes scales
that have a longer mantissa by up to 2^-12 (the relative error of each layer is reported, 0 for the others).
Refused: weights that lie on no such grid, and what `layers.selected` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, fx

from ..compiler.dialect.packing import storable_scale
from ..compiler.dialect.packing_coded import CodedMatrix
from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import GROUP_SIZES, Kind, Recipe, WeightFormat
from .code_ranges import relative_error
from .grids import element_grid, integer_grid, significant_bits
from .layers import Layer, check_finite, packed_bytes, selected, set_argument
from .quantize_coded import coded_call
from .quantize_weights import integer_call
from .ranges import QuantizedMatrix, dequantized

_INTEGER_GROUPS = (0, 128, 64, 32)
_KINDS: tuple[Kind, ...] = ("weights", "embeddings", "convolutions")
_NARROWEST_FIRST = (
    *("int2", "int3", "int4", "mxfp4", "nf4", "mxfp6_e3m2", "mxfp6_e2m3"),
    *("int8", "e4m3", "e5m2", "mxfp8_e4m3", "mxfp8_e5m2"),
)
Found = tuple[QuantizedMatrix | CodedMatrix, WeightFormat]


@define_pass(Guarantee.LOSSY)
def extract_codes(
    editor: Editor, *, recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> None:
    """See the module. Raises InputError that names every layer whose weight holds NaN or infinity."""
    chosen: list[Layer] = []
    for kind in _KINDS:
        for layer, form, reason in list(selected(editor, recipe, kind)):
            if form.format != "prequantized":
                continue
            if reason is None:
                chosen.append(layer)
            else:
                editor.refused(layer.node, reason)
    check_finite(editor, chosen)
    made: dict[tuple[fx.Node, Kind], fx.Node | None] = {}
    for done, layer in enumerate(chosen):
        key = (layer.weight, layer.kind)
        if key not in made:
            made[key] = _extract(editor, layer)
        elif made[key] is not None:
            editor.applied(layer.node, "shares the codes of a layer with the same weight")
        call = made[key]
        if call is not None:
            set_argument(layer.node, "weight", call)
        if progress is not None:
            progress(done + 1, len(chosen))


def _extract(editor: Editor, layer: Layer) -> fx.Node | None:
    """The call that the layer reads its weight from, or None where it is refused."""
    weight = editor.tensor(layer.weight)
    assert weight is not None
    found = next(_grids(layer, weight.flatten(0, 1) if layer.is_grouped else weight), None)
    if found is None:
        editor.refused(
            layer.node,
            "its weight lies on no grid that can be packed (integers, NF4, FP8 or MX, one scale a row or for "
            "groups of 32, 64 or 128 inputs): it was not rounded, or in another way",
        )
        return None
    codes, form = found
    plain, packed = (
        weight.numel() * weight.element_size(),
        packed_bytes(layer.kind, tuple(weight.shape), form),
    )
    if packed >= plain:
        editor.refused(layer.node, f"too small: it takes {plain} bytes in float and {packed} packed")
        return None
    call, error = _write(editor, layer, weight, codes, form)
    name = f"int{form.bits}" if form.format == "int" else form.format
    per = f"groups of {form.group_size}" if form.group_size else "one scale a row"
    zeros = "" if form.symmetric else ", zero points"
    editor.applied(
        layer.node,
        f"weight already is {name}, {per}{zeros}, relative error {error:.2e}",
        kind=layer.kind,
        format=form.format,
        shape=list(weight.shape),
        bits=form.bits if form.format == "int" else packed * 8 // max(weight.numel(), 1),
        group_size=form.group_size,
        symmetric=form.symmetric,
        bytes_before=plain,
        bytes_after=packed,
        weight_error=error,
    )
    return call


def _grids(layer: Layer, matrix: Tensor) -> Iterator[Found]:
    """Formats that give the weight back, the narrowest first."""
    precision = significant_bits(matrix)
    inputs = matrix[0].numel()
    for name in _NARROWEST_FIRST:
        if name.startswith("int"):
            yield from _integers(layer, matrix, int(name.removeprefix("int")), inputs, precision)
        elif layer.kind == "weights" and not layer.is_grouped:
            for size in sorted(GROUP_SIZES[name], key=lambda size: -(size or inputs)):
                codes = element_grid(matrix, name, size, precision)
                if codes is not None:
                    yield codes, WeightFormat.model_validate({"format": name, "group_size": size})


def _integers(layer: Layer, matrix: Tensor, bits: int, inputs: int, precision: int) -> Iterator[Found]:
    least = {"weights": 2, "embeddings": 4, "convolutions": 8}[layer.kind]
    for size in _INTEGER_GROUPS if bits >= least else ():
        if (
            (size == 0 and bits < 4)
            or (size >= inputs and bits >= 4)
            or (size and layer.kind == "convolutions")
        ):
            continue
        found = integer_grid(matrix, bits, size, precision, zeros=layer.kind != "convolutions")
        if found is not None:
            form = {"bits": bits, "group_size": size, "symmetric": found.zero is None}
            yield found, WeightFormat.model_validate(form)


def _write(
    editor: Editor, layer: Layer, weight: Tensor, found: QuantizedMatrix | CodedMatrix, form: WeightFormat
) -> tuple[fx.Node, float]:
    """The call that decodes the codes, and the relative error of what it gives."""
    if isinstance(found, CodedMatrix):
        call = coded_call(editor, found, layer.weight, layer.node)
        return call, relative_error(weight, found.dequantized())
    scale = found.scale
    if layer.kind != "embeddings":
        scale, _ = storable_scale(scale, form.group_size)
    stored = QuantizedMatrix(found.codes, scale, found.zero, 0.0)
    error = relative_error(weight, dequantized(stored, form.group_size).reshape(weight.shape))
    return integer_call(editor, layer, stored, form.group_size), error
