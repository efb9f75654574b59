"""OPT: LayerNorm, learned positions, ReLU. `base` has the shapes of the 125M model."""

from __future__ import annotations

from .case import ModelCase, sequence_up_to
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "base": {},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**SIZES[size])
    return causal_language_model(
        name, OPTForCausalLM, config, attention, seed, sequence_up_to(config.max_position_embeddings)
    )
