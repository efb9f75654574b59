"""Phi-3: as Llama, with one linear for q, k, v and one for gate and up. `base` has the mini's shapes, four layers."""

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
        "pad_token_id": 0,
    },
    "base": {"num_hidden_layers": 4},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return causal_language_model(name, Phi3ForCausalLM, Phi3Config(**SIZES[size]), attention, seed)
