"""Falcon: attention and MLP in parallel behind one LayerNorm, one key and value head, rotary, no biases.

`base` has the shapes of the 1B model that was trained on RefinedWeb, with rotary embedding as the 7B has.
"""

from __future__ import annotations

from .case import ModelCase
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "base": {"vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""
    from transformers import FalconConfig, FalconForCausalLM

    return causal_language_model(name, FalconForCausalLM, FalconConfig(**SIZES[size]), attention, seed)
