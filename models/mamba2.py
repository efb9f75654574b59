"""Mamba2: causal depthwise convolution and chunked selective scan, no attention. `base` is the 130M model."""

from __future__ import annotations

from torch.export import Dim

from .case import ModelCase
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "chunk_size": 8,
    },
    "base": {
        "vocab_size": 50288,
        "hidden_size": 768,
        "num_heads": 24,
        "head_dim": 64,
        "n_groups": 1,
        "num_hidden_layers": 24,
    },
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits; longer than one chunk, where the scan's own branch begins."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(**SIZES[size])
    chunk = config.chunk_size
    # A named Dim fails: sympy cannot show its range against the length rounded up to chunks.
    return causal_language_model(
        name,
        Mamba2ForCausalLM,
        config,
        "eager",
        seed,
        sequence=Dim.DYNAMIC,
        lengths=(chunk + 3, 2 * chunk + 5),
        static=f"sequences of at most one chunk ({chunk}) take another branch of the scan",
    )
