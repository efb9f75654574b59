"""Gemma 2: RMSNorms with gains of 1 + w before and after attention and MLP, logit cap, windows in every other layer.

`base` has the shapes of the 2B model with four of its layers.
"""

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
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        # At the published 50 and 30 nothing of so small a model would reach the caps.
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
    },
    "base": {"num_hidden_layers": 4},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`; eager, as sdpa leaves out the cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return causal_language_model(name, Gemma2ForCausalLM, Gemma2Config(**SIZES[size]), "eager", seed)
