"""GPT-OSS: experts with biases whose matrices are stored inputs first, gate and up interleaved and clamped; attention
with a sink for each head, every other layer in a window. `base` has the shapes of the 20B model."""

from __future__ import annotations

from .case import ModelCase
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
    },
    "base": {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`. Sinks exist in eager attention only."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return causal_language_model(name, GptOssForCausalLM, GptOssConfig(**SIZES[size]), "eager", seed)
