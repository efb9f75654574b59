"""Simulated rounding of activations becomes `quantize_dequantize`.

    (clamp(round(x / s) + z, lo, hi) - z) s  →  quantize_dequantize(x, (s, z - lo), bits)         s, z constants
    the same with s, z from min x and max x  →  quantize_dequantize(x, None, "token", bits)       of each row

Models quantized by other tools, and those that simulate a quantizer while they train, round their activations with ATen
operators. Packed linears and convolutions read `quantize_dequantize` (`rounding_chains` reads the spellings).

Constant pairs: equal (REAL) where hi - lo is 255 or 15, as codes from 0 are those from lo shifted. With fewer levels
the kernels' quantizer goes on where the model's clamps: it starts or ends with the model's on one side, and on the
other x is known to be within, or clamped to hi s in front.
Pairs of each row: equal (REAL) up to the guard of the scale against small rows, where they are the kernels' own
(asymmetric, a range with 0 in it). Others are replaced (LOSSY) where the kernels' step is at no row wider: symmetric
ones (max|x| / 127 is no less than the range / 255), and those that share a range between rows. The driver measures the
difference. Rounding of x / s + z in one differs at ties only. A row of zeros, with which a scale without a guard makes
NaN, is zeros.

Only inputs of linears and convolutions that the recipe quantizes are touched, also through views between the rounding
and the layer, which then stand in front. What is rounded twice on one grid, with views and max pools between, is
rounded once: rounding is monotone, so that the largest rounded value is the largest value rounded. Refused: scales that
are no number for the tensor, a sample or a token, codes of more than 256 levels, steps that are narrower than the
kernels', values that are not float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.integer_values import Bounds
from ..compiler.canonicalize.match import RESHAPES, VIEWS, equal_sizes, is_call, operands
from ..compiler.dialect import quantize_dequantize
from ..compiler.dialect.quantization import dynamic_params, levels
from ..compiler.editor import Editor
from ..compiler.graph import dtype, shape
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe
from .layers import Layer, layers
from .rounding_chains import Rounding, Term, roundings
from .row_ranges import GRANULARITIES, RowFormula, UnknownFormulaError, probes

aten = torch.ops.aten

_Grid = tuple[float, float | None, float | None]
"""Step of a rounding, and the least and largest code."""
_SAME = 1e-6
"""Relative difference of two steps that are one."""


@dataclass(frozen=True)
class _Quantizer:
    """The kernels' quantizer in place of a rounding. static: its pair; most: what x is clamped to in front of it."""

    bits: int
    granularity: str
    static: tuple[float, float] | None
    what: str
    exact: bool
    most: float | None = None


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a value through these views, innermost first."""

    layer: Layer
    views: tuple[fx.Node, ...] = ()


@define_pass(Guarantee.LOSSY)
def extract_rounding(editor: Editor, *, recipe: Recipe) -> None:
    """Replace roundings of the inputs of layers that the recipe quantizes."""
    _round_once(editor)
    readers = _readers(editor, recipe)
    bounds = Bounds(editor)
    for node, found in roundings(editor):
        if isinstance(found, str):
            editor.refused(node, found)
            continue
        moves = VIEWS if not found.scale.powers else ()
        read_by = [
            r for r in readers.get(found.result, ()) if all(_may_move(view, moves) for view in r.views)
        ]
        if not read_by:
            if found.low is not None or found.high is not None:
                editor.refused(
                    node, "no linear or convolution that the recipe quantizes reads what is rounded here"
                )
            continue
        wanted = "sample" if all(r.layer.kind == "convolutions" for r in read_by) else "token"
        quantizer = _quantizer(editor, bounds, found, wanted)
        if isinstance(quantizer, str):
            editor.refused(node, quantizer)
            continue
        _replace(editor, found, quantizer, read_by)


def _round_once(editor: Editor) -> None:
    """Leave out roundings that all readers round again on the same grid, behind what only chooses among elements."""
    pairs: dict[fx.Node, _Grid] = {}
    results: list[tuple[Rounding, _Grid]] = []
    for _, found in roundings(editor):
        if not isinstance(found, str) and not found.scale.powers:
            grid = (found.scale.coefficient, _number(found.low), _number(found.high))
            pairs[found.first] = grid
            results.append((found, grid))
    for found, grid in reversed(results):
        if None not in grid and _is_rounded_again(found.result, grid, pairs):
            editor.applied(found.result, "all that read it round it again on the same grid: once is enough")
            editor.replace(found.result, found.x)


def _is_rounded_again(node: fx.Node, grid: _Grid, pairs: dict[fx.Node, _Grid]) -> bool:
    return bool(node.users) and all(
        pairs.get(user) == grid
        or (is_call(user, *VIEWS, aten.max_pool2d.default) and _is_rounded_again(user, grid, pairs))
        for user in node.users
    )


def _readers(editor: Editor, recipe: Recipe) -> dict[fx.Node, list[_Reader]]:
    """For each value the layers that the recipe quantizes and that read it, as it is or through views."""
    found: dict[fx.Node, list[_Reader]] = {}
    for layer in layers(editor):
        if layer.kind == "embeddings" or recipe.format_for(layer.path, layer.kind) is None:
            continue
        node: fx.Node = layer.input
        views: tuple[fx.Node, ...] = ()
        found.setdefault(node, []).append(_Reader(layer))
        while is_call(node, *VIEWS):
            views = (node, *views)
            node = operands(node)[0]
            found.setdefault(node, []).append(_Reader(layer, views))
    return found


def _may_move(view: fx.Node, moves: tuple[object, ...]) -> bool:
    """Whether a view gives the same in front of the quantizer: it moves single elements, or leaves rows whole."""
    if is_call(view, *moves):
        return True
    before, after = shape(operands(view)[0]), shape(view)
    if not is_call(view, *RESHAPES) or not before or not after:
        return False
    return equal_sizes(before[-1], after[-1])


def _quantizer(editor: Editor, bounds: Bounds, found: Rounding, wanted: str) -> _Quantizer | str:
    if dtype(found.x) != torch.float32 or dtype(found.result) != torch.float32:
        return f"it rounds {dtype(found.x)}, not float32"
    if any(editor.tensor(node) is not None for node, _ in found.scale.powers):
        return "its scale is a constant with a number for each channel or row, and kernels take one number"
    if not found.scale.powers:
        return _static(bounds, found)
    try:
        return _dynamic(editor, found, wanted)
    except UnknownFormulaError as error:
        return str(error)


def _static(bounds: Bounds, found: Rounding) -> _Quantizer | str:
    scale = found.scale.coefficient
    low, high = (_number(term) for term in (found.low, found.high))
    if low is None or high is None:
        return "its codes are not clamped to constants"
    count = high - low
    if not (scale > 0 and low.is_integer() and high.is_integer() and low <= 0 <= high):
        return (
            f"its scale is {scale:g} and its codes are {low:g}..{high:g}, which have to be whole and around 0"
        )
    if count > levels(8):
        return f"its codes are {low:g}..{high:g}, more than 256"
    bits = 4 if count <= levels(4) else 8
    least, most, _ = bounds.of(found.x)
    zero, end = 0.0 - low, None
    if count < levels(bits) and most >= (high + 0.5) * scale:
        # The quantizer can end where the model's does on one side; the other is known to be within, or clamped.
        if least > (low - 0.5) * scale:
            zero = levels(bits) - high
        else:
            end = high * scale
    what = f"static uint{bits}, scale {scale:.4g}, zero point {zero:g}"
    if end is not None:
        what += f", clamped to {end:.4g} in front, as its codes {low:g}..{high:g} are fewer"
    return _Quantizer(bits, "token", (scale, zero), what, exact=True, most=end)


def _dynamic(editor: Editor, found: Rounding, wanted: str) -> _Quantizer | str:
    low, high = probes()
    formula = RowFormula(editor, found.x, low, high)
    scale = formula.scale(found.scale)
    ends = [None if term is None else formula.term(term) for term in (found.low, found.high)]
    count = _levels(ends, low, high, scale)
    if count > levels(8):
        return f"its codes have {count + 1:g} levels, more than 256"
    bits = 4 if count <= levels(4) else 8
    own, zero = (p.squeeze(-1) for p in dynamic_params(torch.stack((low, high), -1), (1,), bits))
    granularity = formula.granularity
    sizes = shape(found.x) or ()
    if granularity == "tensor" and sizes and isinstance(sizes[0], int) and sizes[0] == 1:
        granularity = "sample"
    if bool((scale < own * (1 - _SAME)).any()):
        return (
            f"its step is narrower than that of uint{bits} over a row's range (down to "
            f"{float((scale / own).min()):.3g} times), so that it clamps values that the kernels would not"
        )
    alike = granularity == wanted or (len(sizes) == 2 and granularity != "tensor")
    if not alike and GRANULARITIES.index(granularity) < GRANULARITIES.index(wanted):
        return f"its scale is for each {granularity}, and the convolutions that read it take one for each {wanted}"
    guard = _guard(editor, found)
    exact = alike and ends[0] is not None and _is_own(scale, own, -ends[0], zero, count, bits)
    if exact:
        what = (
            f"dynamic uint{bits} of each {wanted}, equal for rows of a range above {guard * levels(bits):.3g}"
        )
    elif alike:
        ratio = float((scale / own).max())
        what = (
            f"dynamic uint{bits} of each {wanted}, with steps 1 to {ratio:.3g} times as narrow as the model's"
        )
    else:
        what = f"dynamic uint{bits} of each {wanted}, in place of the wider one range for each {granularity}"
    return _Quantizer(bits, wanted, None, what, exact)


def _is_own(scale: Tensor, own: Tensor, zero: Tensor, own_zero: Tensor, count: float, bits: int) -> bool:
    same = (scale / own - 1).abs() <= _SAME
    return bool(same.all()) and torch.equal(zero, own_zero) and count == levels(bits)


def _levels(ends: list[Tensor | None], low: Tensor, high: Tensor, scale: Tensor) -> float:
    """How many codes there are beside one: between the clamps, and where there is none, that rows reach."""
    reached = (torch.round(low.clamp(max=0) / scale), torch.round(high.clamp(min=0) / scale))
    first, last = (held if held is not None else own for held, own in zip(ends, reached, strict=True))
    return float((last - first).max())


def _guard(editor: Editor, found: Rounding) -> float:
    """The largest of the scales of very small rows: what theirs is kept above."""
    low, high = probes(16, 1e-60)
    return float(RowFormula(editor, found.x, low, high).scale(found.scale).max())


def _number(term: Term | None) -> float | None:
    return None if term is None or term.nodes else term.number


def _replace(editor: Editor, found: Rounding, quantizer: _Quantizer, readers: list[_Reader]) -> None:
    x, params = found.x, None
    if quantizer.most is not None:
        x = editor.call(aten.clamp.default, x, None, quantizer.most, like=found.result)
    if quantizer.static is not None:
        params = editor.constant(torch.tensor(quantizer.static), f"{readers[0].layer.node.name}_input_params")
    editor.applied(
        found.result,
        f"input to {quantizer.what}, for {len(readers)} layers",
        mode="dynamic" if quantizer.static is None else "static",
        bits=quantizer.bits,
        exact=quantizer.exact,
        readers=[reader.layer.path for reader in readers],
    )
    # Views first: what is behind them goes with the value that they view.
    for views in sorted({reader.views for reader in readers}, key=len, reverse=True):
        moved, replaced = x, views[-1] if views else found.result
        for view in views:
            moved = editor.call(view.target, moved, *operands(view)[1:], like=replaced)
        arguments: tuple[Any, ...] = (moved, params, quantizer.granularity, quantizer.bits)
        editor.replace(replaced, editor.call(quantize_dequantize.overload, *arguments, like=replaced))
