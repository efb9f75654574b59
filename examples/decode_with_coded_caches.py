"""Decode token by token with caches of keys and values that are codes, in onnxruntime alone.

    python examples/decode_with_coded_caches.py [FOLDER]

`compile_decoder` turns a decoder that takes and returns its caches as floats into one that takes and returns codes of 4
bits with a pair of scale and zero point for each token and head. `decode` is what a server does with the result: it
knows the model from the artefact's manifest, begins with caches without tokens, and feeds every step's into the next.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy
import onnxruntime

LAYERS, HEADS, HEAD_SIZE = 2, 2, 32


def compile_decoder(folder: Path) -> None:
    """A small Llama with grouped queries, one token at a time."""
    import torch
    from torch import Tensor, nn
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    import isofold

    class Decoder(nn.Module):
        """Caches as plain tensors, `(keys, values)` for each layer."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, past: tuple[tuple[Tensor, Tensor], ...]) -> tuple[object, ...]:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(past):
                cache.update(keys, values, layer)
            logits = self.model(input_ids=ids, past_key_values=cache).logits
            return logits, tuple((layer.keys, layer.values) for layer in cache.layers)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=4 * HEAD_SIZE,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
    )
    # Examples serve verification, so they look like what comes: caches with some tokens. Their number varies.
    past = tuple(
        (torch.randn(1, HEADS, 6, HEAD_SIZE), torch.randn(1, HEADS, 6, HEAD_SIZE)) for _ in range(LAYERS)
    )
    tokens = {2: torch.export.Dim.AUTO}
    recipe = {
        "weights": {"bits": 8},
        "activations": {"mode": "dynamic"},
        "kv": {"bits": 4, "storage": "codes"},
        "fold": {"rotation": "hadamard"},
    }
    isofold.compile(
        Decoder(LlamaForCausalLM(config).eval()),
        (torch.tensor([[1]]), past),
        dynamic_shapes=(None, ((tokens, tokens),) * LAYERS),
        recipe=recipe,
        output=folder,
    )


def decode(folder: Path, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding. Needs no torch and no isofold."""
    caches = json.loads((folder / "isofold.json").read_text())["caches"]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(folder / "libisofold_ops.so"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    ports = {port.name: port for port in session.get_inputs()}
    kinds = {"tensor(uint8)": numpy.uint8, "tensor(float)": numpy.float32}

    def empty(name: str) -> numpy.ndarray:
        """[batch, heads, tokens, ...] without tokens."""
        batch, heads, _, width = ports[name].shape
        return numpy.zeros((batch, heads, 0, width), kinds[ports[name].type])

    state = {name: empty(name) for cache in caches for name in cache["inputs"]}
    following = {o: i for cache in caches for o, i in zip(cache["outputs"], cache["inputs"], strict=True)}
    ids = next(name for name in ports if name not in state)
    outputs = [port.name for port in session.get_outputs()]
    text, token = list(prompt), None
    for position in range(len(prompt) + steps - 1):
        token = text[position]
        results = dict(zip(outputs, session.run(None, {ids: numpy.array([[token]]), **state}), strict=True))
        state = {following[name]: results[name] for name in following}
        if position >= len(prompt) - 1:
            logits = next(results[name] for name in outputs if name not in following)
            text.append(int(logits[0, -1].argmax()))
    held = sum(array.nbytes for array in state.values())
    floats = sum(cache["float_bytes"] for cache in caches) * (len(text) - 1)
    print(f"caches of {len(text) - 1} tokens: {held} bytes, as floats {floats}")
    return text


def main(folder: str | None = None) -> None:
    """Compile and decode."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or Path(temporary) / "decoder")
        compile_decoder(path)
        print("tokens:", *decode(path, [1, 7, 42], 8))


if __name__ == "__main__":
    main(*sys.argv[1:])
