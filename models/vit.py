"""ViT: patches by a strided convolution, a class token, encoder. `base` is ViT-B/16."""

from __future__ import annotations

from .case import BATCH, ModelCase, noise, reproducible, seeded
from .image import HiddenOfPixels

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    },
    "base": {},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """float32 `[batch, 3, image, image]` to `[batch, patches + 1, hidden]`."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SIZES[size])
    with reproducible(seed):
        model = ViTModel._from_config(config, attn_implementation=attention, add_pooling_layer=False)
    side = config.image_size
    return ModelCase(
        name,
        HiddenOfPixels(seeded(model, seed)).eval(),
        (noise(2, 3, side, side),),
        (noise(3, 3, side, side),),
        ({0: BATCH},),
        "one position embedding for each patch fixes the image's size",
    )
