"""What the decoder-only language models share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .case import BATCH, SEQUENCE, ModelCase, reproducible, seeded, token_ids


class LogitsOfTokens(nn.Module):
    """Token ids to logits without a cache; causal mask only (right padding reaches no real token)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def causal_language_model(
    name: str,
    model_class: Any,
    config: Any,
    attention: str,
    seed: int,
    sequence: object = SEQUENCE,
    lengths: tuple[int, int] = (9, 13),
    static: str | None = None,
) -> ModelCase:
    """A `...ForCausalLM` class: int64 `[batch, sequence]` to `[batch, sequence, vocabulary]`."""
    with reproducible(seed):
        model = model_class._from_config(config, attn_implementation=attention)
    args, other = (token_ids(2, lengths[0], config.vocab_size), token_ids(3, lengths[1], config.vocab_size))
    module = LogitsOfTokens(seeded(model, seed)).eval()
    return ModelCase(name, module, (args,), (other,), ({0: BATCH, 1: sequence},), static)
