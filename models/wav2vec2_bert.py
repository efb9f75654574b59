"""Wav2Vec2-BERT: conformer layers with relative key positions, gated and depthwise convolutions.

`base` has the shapes of the 600M model with four of its layers."""

from __future__ import annotations

from torch import Tensor, nn

from .case import BATCH, SEQUENCE, ModelCase, noise, padding_mask, reproducible, seeded

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "feature_projection_input_dim": 32,
        "conv_depthwise_kernel_size": 7,
    },
    "base": {"num_hidden_layers": 4},
}


class HiddenOfFeatures(nn.Module):
    """Filter bank features and padding mask to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_features, attention_mask=attention_mask).last_hidden_state


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """float32 `[batch, sequence, features]` and int64 `[batch, sequence]` to `[batch, sequence, hidden]`."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    config = Wav2Vec2BertConfig(**SIZES[size])
    with reproducible(seed):
        model = Wav2Vec2BertModel._from_config(config, attn_implementation=attention)
    features = config.feature_projection_input_dim
    free = {0: BATCH, 1: SEQUENCE}
    return ModelCase(
        name,
        HiddenOfFeatures(seeded(model, seed)).eval(),
        (noise(2, 21, features), padding_mask(2, 21)),
        (noise(3, 33, features), padding_mask(3, 33)),
        (free, free),
    )
