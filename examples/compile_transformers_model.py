"""Compile a transformers model; its config tells isofold what its inputs look like.

    python examples/compile_transformers_model.py [artefact folder]

The model is a small Llama with random weights, so that this runs without a download;
`LlamaForCausalLM.from_pretrained(...)` in its place works the same way.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import isofold


def main(folder: str = "llama-w4a8") -> None:
    """Compile, compare with PyTorch, print what the report says."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()

    compiled = isofold.compile(model, recipe="w4a8", output=folder, overwrite=True)

    # Any batch and length: the sizes that the model allows to vary are free.
    ids = torch.randint(0, config.vocab_size, (1, 23))
    inputs = {
        port.name: ids if port.name == "input_ids" else torch.ones_like(ids) for port in compiled.inputs
    }
    found = compiled(**inputs)
    logits = found["logits"] if isinstance(found, dict) else found
    with torch.no_grad():
        wanted = model(**inputs).logits
    cosine = torch.nn.functional.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0)
    totals = compiled.report["totals"]
    print(f"weights {totals['weight_bytes_before']:,} -> {totals['weight_bytes_after']:,} bytes")
    print(f"cosine to PyTorch {cosine:.4f}, {compiled.benchmark(runs=20)['median_ms']:.2f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
