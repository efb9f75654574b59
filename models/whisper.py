"""Whisper: convolutions into the encoder, LayerNorm before each block, cross attention.

`base` has the shapes of whisper-tiny."""

from __future__ import annotations

from torch import Tensor, nn
from torch.export import Dim

from .case import BATCH, ModelCase, noise, reproducible, seeded, token_ids

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_source_positions": 24,
        "max_target_positions": 64,
        "num_mel_bins": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "base": {},
}


class Both(nn.Module):
    """Mel features and target ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.model(
            input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False
        ).logits


class Encoder(nn.Module):
    """Mel features to the encoder's hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model.get_encoder()  # type: ignore[operator]  # transformers' models carry no types here

    def forward(self, input_features: Tensor) -> Tensor:
        return self.encoder(input_features).last_hidden_state


class Decoder(nn.Module):
    """Target ids and the encoder's hidden states to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model.get_decoder()  # type: ignore[operator]  # transformers' models carry no types here
        self.proj_out = model.proj_out

    def forward(self, decoder_input_ids: Tensor, hidden: Tensor) -> Tensor:
        out = self.decoder(input_ids=decoder_input_ids, encoder_hidden_states=hidden, use_cache=False)
        return self.proj_out(out.last_hidden_state)  # type: ignore[operator]  # a submodule, typed Tensor | Module


def build(name: str, size: str, attention: str, seed: int, part: str) -> ModelCase:
    """`part` is `both`, `encoder` or `decoder`; features are float32 `[batch, mel bins, frames]`."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(**SIZES[size])
    with reproducible(seed):
        model = WhisperForConditionalGeneration._from_config(config, attn_implementation=attention)
    seeded(model, seed)
    frames = config.max_source_positions

    def inputs(batch: int, length: int) -> tuple[Tensor, ...]:
        features, ids = (
            noise(batch, config.num_mel_bins, 2 * frames),
            token_ids(batch, length, config.vocab_size),
        )
        if part == "encoder":
            return (features,)
        if part == "decoder":
            return ids, noise(batch, frames, config.d_model)
        return features, ids

    audio, target = {0: BATCH}, {0: BATCH, 1: Dim("target", min=1, max=config.max_target_positions)}
    module, free = {
        "encoder": (Encoder, (audio,)),
        "decoder": (Decoder, (target, audio)),
        "both": (Both, (audio, target)),
    }[part]
    static = f"the model accepts {2 * frames} mel frames only, so its encoder length is fixed"
    return ModelCase(name, module(model).eval(), inputs(2, 5), inputs(3, 7), free, static)
