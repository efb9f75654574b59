"""Convolutions read an int8 weight with one scale for each output channel.

    conv(x, W) → conv(x, dequantize_weight(codes, scale))

LOSSY: the weight is the matrix `[O, C kh kw]` of the unfolded convolution, rounded like a linear's. The input
is quantized by `quantize_activations`, per sample or with a static pair.

Refused: grouped, depthwise and transposed convolutions, three spatial dimensions, uneven `same` padding,
computed weights, and convolutions whose activations the recipe leaves in float.
"""

from __future__ import annotations

from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe
from .quantize_weights import Progress, quantize_kind


@define_pass(Guarantee.LOSSY)
def quantize_convolutions(editor: Editor, *, recipe: Recipe, progress: Progress | None = None) -> None:
    """Quantize convolution weights as the recipe says. Raises InputError for NaN or infinite weights."""
    quantize_kind(editor, recipe, "convolutions", storable=True, progress=progress)
