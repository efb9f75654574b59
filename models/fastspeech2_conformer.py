"""FastSpeech2Conformer: conformers with macaron MLPs of convolutions, relative positions, batch norms; a vocoder.

Between its halves each phoneme is repeated for the frames it lasts, which depends on data and is not exported: the
encoder half ends in front of it, the decoder half begins behind it. `base` has the published shapes.
"""

from __future__ import annotations

from torch import Tensor, nn

from .case import BATCH, ModelCase, noise, reproducible, seeded, sequence_up_to, token_ids

SIZES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "tiny": (
        {
            "vocab_size": 160,
            "hidden_size": 64,
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_num_attention_heads": 4,
            "encoder_linear_units": 96,
            "encoder_kernel_size": 5,
            "decoder_layers": 2,
            "decoder_num_attention_heads": 4,
            "decoder_linear_units": 96,
            "decoder_kernel_size": 7,
            "duration_predictor_channels": 32,
            "pitch_predictor_channels": 32,
            "pitch_predictor_layers": 2,
            "energy_predictor_channels": 32,
            "speech_decoder_postnet_units": 32,
            "speech_decoder_postnet_layers": 3,
        },
        {
            "model_in_dim": 16,
            "upsample_initial_channel": 32,
            "upsample_rates": [4, 4],
            "upsample_kernel_sizes": [8, 8],
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
        },
    ),
    "base": ({}, {}),
}


def shifted(scores: Tensor) -> Tensor:
    """`[B, H, S, 2 S - 1]` over relative positions to `[B, H, S, S]` over keys, as the model's own method does.

    The method views `[2 S - 1, S]` as `[S, 2 S - 1]` in one step, which torch.export does not prove possible for
    every S; with one flat dimension in between it does.
    """
    batch, heads, length, positions = scores.shape
    rows = nn.functional.pad(scores, (1, 0)).flatten(2)
    flat = rows[:, :, length:]
    return flat.reshape(batch, heads, length, positions)[..., : positions // 2 + 1]


def exportable(model: nn.Module) -> nn.Module:
    """Put `shifted` in the place of every attention's own method."""
    for module in model.modules():
        if hasattr(module, "shift_relative_position_tensor"):
            module.shift_relative_position_tensor = shifted  # type: ignore[assignment]  # a method, to mypy a submodule
    return model


class Encoder(nn.Module):
    """Phonemes to hidden states that carry pitch and energy; sequences of one length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.parts = nn.ModuleDict(
            {
                name: getattr(model, name)
                for name in ("pitch_predictor", "pitch_embed", "energy_predictor", "energy_embed")
            }
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, None, return_dict=True).last_hidden_state  # type: ignore[operator]  # a submodule, typed Tensor | Module
        pitch, energy = self.parts["pitch_predictor"](hidden), self.parts["energy_predictor"](hidden)
        return hidden + self.parts["energy_embed"](energy) + self.parts["pitch_embed"](pitch)


class Decoder(nn.Module):
    """Hidden states of frames to samples: decoder, postnet, HiFi-GAN."""

    def __init__(self, model: nn.Module, vocoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.postnet = model.decoder, model.speech_decoder_postnet
        self.vocoder = vocoder

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.decoder(frames, None, return_dict=True).last_hidden_state  # type: ignore[operator]  # a submodule, typed Tensor | Module
        _, spectrogram = self.postnet(hidden)  # type: ignore[operator]  # a submodule, typed Tensor | Module
        return self.vocoder(spectrogram)


def build(name: str, size: str, attention: str, seed: int, part: str) -> ModelCase:
    """`encoder`: ids `[batch, sequence]` to `[batch, sequence, hidden]`; `decoder`: frames of those to samples."""
    from transformers import (
        FastSpeech2ConformerConfig,
        FastSpeech2ConformerHifiGan,
        FastSpeech2ConformerHifiGanConfig,
        FastSpeech2ConformerModel,
    )

    options, vocoder_options = SIZES[size]
    config = FastSpeech2ConformerConfig(**options)
    with reproducible(seed):
        model = exportable(FastSpeech2ConformerModel(config))
        vocoder = FastSpeech2ConformerHifiGan(FastSpeech2ConformerHifiGanConfig(**vocoder_options))
    seeded(model, seed)
    vocoder.apply_weight_norm()
    seeded(vocoder, seed)
    free = ({0: BATCH, 1: sequence_up_to(4096, 2)},)
    if part == "encoder":
        ids = (token_ids(2, 9, config.vocab_size), token_ids(3, 13, config.vocab_size))
        return ModelCase(name, Encoder(model).eval(), (ids[0],), (ids[1],), free)
    frames = noise(2, 9, config.hidden_size), noise(3, 13, config.hidden_size)
    return ModelCase(name, Decoder(model, vocoder).eval(), (frames[0],), (frames[1],), free)
