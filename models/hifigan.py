"""HiFi-GAN: a vocoder of transposed and dilated convolutions with weight norm.

`base` has SpeechT5's shapes."""

from __future__ import annotations

from torch import Tensor, nn

from .case import BATCH, SEQUENCE, ModelCase, noise, reproducible, seeded

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "model_in_dim": 16,
        "upsample_initial_channel": 32,
        "upsample_rates": [4, 4],
        "upsample_kernel_sizes": [8, 8],
        "resblock_kernel_sizes": [3, 5],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
    },
    "base": {},
}


class WaveOfSpectrogram(nn.Module):
    """Mel frames to samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.model(spectrogram)


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """float32 `[batch, sequence, mel]` to `[batch, samples]`, weights weight-normed as in training."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    with reproducible(seed):
        model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**SIZES[size]))
    model.apply_weight_norm()
    return ModelCase(
        name,
        WaveOfSpectrogram(seeded(model, seed)).eval(),
        (noise(2, 11, model.config.model_in_dim),),
        (noise(3, 17, model.config.model_in_dim),),
        ({0: BATCH, 1: SEQUENCE},),
    )
