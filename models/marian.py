"""Marian: translation with norms behind the blocks, sinusoidal positions, cross attention.

`base` has the shapes of the OPUS models."""

from __future__ import annotations

from torch import Tensor

from .case import BATCH, ModelCase, padding_mask, reproducible, seeded, sequence_up_to, token_ids
from .t5 import Both

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
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": 1,
    },
    "base": {
        "vocab_size": 58101,
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "max_position_embeddings": 512,
    },
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Source ids, padding mask and target ids to logits `[batch, target, vocabulary]`."""
    from torch.export import Dim
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(**SIZES[size], activation_function="swish")
    with reproducible(seed):
        model = MarianMTModel._from_config(config, attn_implementation=attention)
    seeded(model, seed)
    positions = config.max_position_embeddings
    sequence = sequence_up_to(positions)
    target = Dim("target", min=1, max=positions)

    def inputs(batch: int, length: int, target_length: int) -> tuple[Tensor, ...]:
        ids, mask = token_ids(batch, length, config.vocab_size), padding_mask(batch, length)
        return ids, mask, token_ids(batch, target_length, config.vocab_size)

    source = {0: BATCH, 1: sequence}
    free = (source, source, {0: BATCH, 1: target})
    return ModelCase(name, Both(model).eval(), inputs(2, 9, 5), inputs(3, 13, 7), free)
