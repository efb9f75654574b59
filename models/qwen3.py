"""Qwen3: as Llama, with RMS norms on queries and keys. `base` has the shapes of the 0.6B model."""

from __future__ import annotations

from .case import ModelCase
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "base": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return causal_language_model(name, Qwen3ForCausalLM, Qwen3Config(**SIZES[size]), attention, seed)
