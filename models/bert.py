"""BERT: LayerNorm after the residual sums, GELU, padding mask. `base` is BERT-base without its pooler."""

from __future__ import annotations

from torch import Tensor, nn

from .case import BATCH, ModelCase, padding_mask, reproducible, seeded, sequence_up_to, token_ids

SIZES: dict[str, dict[str, object]] = {
    "tiny": {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "base": {},
}


class HiddenOfTokens(nn.Module):
    """Token ids and padding mask to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def build(name: str, size: str, attention: str, seed: int) -> ModelCase:
    """int64 ids and mask `[batch, sequence]` to float32 `[batch, sequence, hidden]`."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**SIZES[size])
    with reproducible(seed):
        model = BertModel._from_config(config, attn_implementation=attention, add_pooling_layer=False)
    free = {0: BATCH, 1: sequence_up_to(config.max_position_embeddings, 2)}
    return ModelCase(
        name,
        HiddenOfTokens(seeded(model, seed)).eval(),
        (token_ids(2, 9, config.vocab_size), padding_mask(2, 9)),
        (token_ids(3, 13, config.vocab_size), padding_mask(3, 13)),
        (free, free),
    )
