"""T5: RMSNorm, relative position biases, unscaled attention, gated GELU MLP; encoder and decoder.

`base` has the shapes of t5-small in its version 1.1."""

from __future__ import annotations

from torch import Tensor, nn

from .case import BATCH, SEQUENCE, TARGET, ModelCase, noise, padding_mask, reproducible, seeded, token_ids

SIZES: dict[str, dict[str, object]] = {
    "tiny": {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "base": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
}


class Both(nn.Module):
    """Source ids, padding mask and target ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits


class Encoder(nn.Module):
    """Source ids and padding mask to the encoder's hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model.get_encoder()  # type: ignore[operator]  # transformers' models carry no types here

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Decoder(nn.Module):
    """Target ids, the encoder's hidden states and its padding mask to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model.get_decoder()  # type: ignore[operator]  # transformers' models carry no types here
        self.lm_head = model.lm_head

    def forward(self, decoder_input_ids: Tensor, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=hidden,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return self.lm_head(out.last_hidden_state)  # type: ignore[operator]  # a submodule, typed Tensor | Module


def build(name: str, size: str, attention: str, seed: int, part: str) -> ModelCase:
    """`part` is `both`, `encoder` or `decoder`; hidden states are float32 `[batch, sequence, d_model]`."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**SIZES[size], feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with reproducible(seed):
        model = T5ForConditionalGeneration._from_config(config, attn_implementation=attention)
    seeded(model, seed)
    source, target = {0: BATCH, 1: SEQUENCE}, {0: BATCH, 1: TARGET}

    def inputs(batch: int, length: int, target_length: int) -> tuple[Tensor, ...]:
        ids, mask = token_ids(batch, length, config.vocab_size), padding_mask(batch, length)
        target_ids = token_ids(batch, target_length, config.vocab_size)
        if part == "encoder":
            return ids, mask
        if part == "decoder":
            return target_ids, noise(batch, length, config.d_model), mask
        return ids, mask, target_ids

    module, free = {
        "encoder": (Encoder, (source, source)),
        "decoder": (Decoder, (target, source, source)),
        "both": (Both, (source, source, target)),
    }[part]
    return ModelCase(name, module(model).eval(), inputs(2, 9, 5), inputs(3, 13, 7), free)
