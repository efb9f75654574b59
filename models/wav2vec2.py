"""Wav2Vec2: strided convolutions over samples, group norm, a weight-normed positional convolution, encoder.
`base` is the base model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.export import Dim

from .case import BATCH, ModelCase, noise, reproducible, seeded

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "conv_dim": (32, 32, 32),
        "conv_stride": (5, 4, 2),
        "conv_kernel": (10, 4, 3),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    },
    "base": {},
}


class HiddenOfSamples(nn.Module):
    """Audio samples to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_values: Tensor) -> Tensor:
        return self.model(input_values).last_hidden_state


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """float32 `[batch, samples]` to `[batch, frames, hidden]`."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(**SIZES[size])
    with reproducible(seed):
        model = Wav2Vec2Model._from_config(config, attn_implementation=attention)
    stride = config.inputs_to_logits_ratio
    # A named Dim fails: sympy cannot show its range against the frame count, a chain of floor divisions.
    return ModelCase(
        name,
        HiddenOfSamples(seeded(model, seed)).eval(),
        (noise(2, 20 * stride),),
        (noise(3, 30 * stride + 7),),
        ({0: BATCH, 1: Dim.DYNAMIC},),
        "fewer samples than give two frames",
    )
