"""Qwen3-MoE: as Qwen3, with a router and many small gated experts for the MLP.

`base` has the shapes of 30B-A3B, `block` of one of its layers with half of its experts."""

from __future__ import annotations

from .case import ModelCase
from .decoder import causal_language_model

_LAYER: dict[str, object] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "block": {**_LAYER, "vocab_size": 160, "num_experts": 64, "num_hidden_layers": 1},
    "base": {**_LAYER, "vocab_size": 151936, "num_experts": 128, "num_hidden_layers": 48},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return causal_language_model(name, Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES[size]), attention, seed)
