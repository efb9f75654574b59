"""GPT-2: learned positions, LayerNorm before each block, transposed weights (Conv1D) with q, k, v in one.

`base` is the 124M model."""

from __future__ import annotations

from .case import ModelCase, sequence_up_to
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "base": {},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZES[size])
    return causal_language_model(
        name, GPT2LMHeadModel, config, attention, seed, sequence_up_to(config.n_positions)
    )
