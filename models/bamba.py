"""Bamba: Mamba2 layers with some attention layers between, gated MLPs. `base` has the layer shapes of the 9B
model with two of its layers, one of each kind."""

from __future__ import annotations

from torch.export import Dim

from .case import ModelCase
from .decoder import causal_language_model

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "base": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
}


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Token ids `[batch, sequence]` to logits; longer than one chunk, where the scan's own branch begins."""
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(**SIZES[size])
    chunk = config.mamba_chunk_size
    # A named Dim fails: sympy cannot show its range against the length rounded up to chunks.
    return causal_language_model(
        name,
        BambaForCausalLM,
        config,
        attention,
        seed,
        sequence=Dim.DYNAMIC,
        lengths=(chunk + 3, 2 * chunk + 5),
        static=f"sequences of at most one chunk ({chunk}) take another branch of the scan",
    )
