"""OLMo 2: RMSNorms behind attention and MLP only, and over all heads of queries and keys together.

`base` has the shapes of the 1B model with four of its layers."""

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
        "pad_token_id": 0,
    },
    "base": {
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
    },
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return causal_language_model(name, Olmo2ForCausalLM, Olmo2Config(**SIZES[size]), attention, seed)
