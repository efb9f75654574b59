"""GPT-NeoX: parallel attention and MLP, one linear for q, k, v, rotary on a quarter of each head.

`base` is Pythia 160M."""

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
    },
    "base": {
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return causal_language_model(name, GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES[size]), attention, seed)
