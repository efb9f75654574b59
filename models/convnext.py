"""ConvNeXt: depthwise convolutions, LayerNorm over channels, linears as pointwise convolutions, layer scale.
`base` is ConvNeXt-T."""

from __future__ import annotations

from torch.export import Dim

from .case import BATCH, ModelCase, noise, reproducible, seeded
from .image import HiddenOfPixels

SIZES: dict[str, dict[str, object]] = {
    "tiny": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]},
    "base": {},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """float32 `[batch, 3, height, width]`, multiples of 32, to `[batch, channels, rows, columns]`."""
    from transformers import ConvNextConfig, ConvNextModel

    with reproducible(seed):
        model = ConvNextModel(ConvNextConfig(**SIZES[size]))
    height, width = Dim("rows", min=1, max=64), Dim("columns", min=1, max=64)
    return ModelCase(
        name,
        HiddenOfPixels(seeded(model, seed)).eval(),
        (noise(2, 3, 64, 64),),
        (noise(3, 3, 96, 64),),
        ({0: BATCH, 2: 32 * height, 3: 32 * width},),
        "height and width are multiples of 32",
    )
