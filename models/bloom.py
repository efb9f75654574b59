"""BLOOM: linear biases (ALiBi), a LayerNorm behind the embedding, one linear for q, k, v interleaved by head.

`base` has the shapes of the 560M model with four of its layers.
"""

from __future__ import annotations

from .case import ModelCase
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {"vocab_size": 160, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "base": {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 4, "n_head": 16},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`; has eager attention only."""
    from transformers import BloomConfig, BloomForCausalLM

    return causal_language_model(name, BloomForCausalLM, BloomConfig(**SIZES[size]), "eager", seed)
