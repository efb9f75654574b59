"""MPT: attention written out with linear biases (ALiBi), LayerNorm without bias, one linear for q, k, v.

`base` has the layer shapes of the 1B model with four of its layers.
"""

from __future__ import annotations

from .case import ModelCase, sequence_up_to
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {"vocab_size": 160, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "base": {"vocab_size": 50368, "d_model": 2048, "n_heads": 16, "n_layers": 4},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits `[batch, sequence, vocabulary]`; has eager attention only."""
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(**SIZES[size])
    return causal_language_model(
        name, MptForCausalLM, config, "eager", seed, sequence_up_to(config.max_seq_len - 1, 2)
    )
