"""The same spaces come out when a model is written with other operators, and every fold of them is exact there too."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.spaces.analysis import analyse
from isofold.models.bert import HiddenOfTokens
from isofold.models.case import BATCH, ModelCase, noise, padding_mask, seeded, sequence_up_to, token_ids
from isofold.models.decoder import causal_language_model
from isofold.models.image import HiddenOfPixels

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WORDS = {**SIZES, "vocab_size": 24, "max_position_embeddings": 16}
DECODERS: dict[str, tuple[Any, Any]] = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**WORDS, num_key_value_heads=2)),
    "gpt_neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**WORDS, rotary_pct=0.5)),
    "opt": (
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            vocab_size=24, hidden_size=16, word_embed_proj_dim=16, ffn_dim=12, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=16, pad_token_id=None,
        ),
    ),
    "mpt": (hf.MptForCausalLM, lambda: hf.MptConfig(vocab_size=24, d_model=16, n_heads=4, n_layers=1, max_seq_len=32)),
    "bloom": (hf.BloomForCausalLM, lambda: hf.BloomConfig(vocab_size=24, hidden_size=16, n_head=4, n_layer=1)),
}  # fmt: skip


def build(name: str) -> ModelCase:
    if name == "bert":
        model = hf.BertModel._from_config(
            hf.BertConfig(**WORDS), attn_implementation="sdpa", add_pooling_layer=False
        )
        free = {0: BATCH, 1: sequence_up_to(16, 2)}
        args = (token_ids(2, 9, 24), padding_mask(2, 9))
        return ModelCase(name, HiddenOfTokens(seeded(model)), args, args, (free, free))
    if name == "vit":
        model = hf.ViTModel._from_config(
            hf.ViTConfig(**SIZES, image_size=8, patch_size=4),
            attn_implementation="sdpa",
            add_pooling_layer=False,
        )
        pixels: tuple[Tensor, ...] = (noise(2, 3, 8, 8),)
        return ModelCase(name, HiddenOfPixels(seeded(model)), pixels, pixels, ({0: BATCH},))
    kind, config = DECODERS[name]
    attention = "eager" if name in ("mpt", "bloom") else "sdpa"
    case = causal_language_model(name, kind, config(), attention, 0, sequence_up_to(15, 2))
    return ModelCase(name, case.module, case.args, case.other_args, case.dynamic_shapes)


@cache
def plain(name: str) -> tuple[ModelCase, Any]:
    case = build(name)
    return case, canonicalize(capture(case.module, case.args, dynamic_shapes=case.dynamic_shapes)).program


QUICK = [
    ("llama", "fused"), ("llama", "all"), ("bert", "conv2d"), ("opt", "einsum"), ("vit", "fused heads"),
    ("mpt", "separate"),
]  # fmt: skip
SLOW = [
    ("llama", "einsum attention"), ("llama", "conv1d"), ("bert", "matmul"), ("bert", "softmax"), ("bert", "fused"),
    ("bert", "all"), ("opt", "all"), ("vit", "all"), ("mpt", "all"), ("gpt_neox", "conv2d"),
    ("gpt_neox", "einsum of heads"), ("bloom", "conv1d"), ("bloom", "all"),
]  # fmt: skip
PAIRS = [pytest.param(*pair, marks=pytest.mark.slow if pair in SLOW else ()) for pair in (*QUICK, *SLOW)]


@pytest.mark.parametrize(("model", "spelling"), PAIRS)
def test_other_spellings_have_the_same_spaces(
    model: str, spelling: str, spaces_benchmark: ModuleType, spellings: ModuleType
) -> None:
    torch.manual_seed(0)
    case, program = plain(model)
    wide = spaces_benchmark.widened(program)
    ready, gains, total = spaces_benchmark.prepared(wide)
    twin = spaces_benchmark.widened(spellings.SPELLINGS[spelling].program(case))
    twin_ready, twin_gains, twin_total = spaces_benchmark.prepared(twin)
    wanted, found = (spellings.outline(analyse(p)) for p in (ready, twin_ready))
    assert found == wanted
    assert sum(wanted[0].values()) >= 3
    assert (twin_gains, twin_total) == (gains, total)
    folded = spaces_benchmark.folded(twin_ready, torch.Generator().manual_seed(0))
    assert relative_error(wide.run_float64(), folded.run_float64()) < 1e-9


def test_every_spelling_is_tested(spellings: ModuleType) -> None:
    assert {spelling for _, spelling in (*QUICK, *SLOW)} == set(spellings.SPELLINGS)


class Small(nn.Module):
    """One attention and one MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(x)))


#: Spelling: what is captured instead of what.
OPERATORS = {
    "matmul": ("matmul", "linear"),
    "einsum": ("einsum", "linear"),
    "einsum of heads": ("einsum", "linear"),
    "conv1d": ("conv1d", "linear"),
    "conv2d": ("conv2d", "linear"),
    "softmax": ("softmax", "scaled_dot_product_attention"),
    "einsum attention": ("einsum", "scaled_dot_product_attention"),
    "all": ("einsum", "linear"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_spellings_are_other_programs(name: str, spellings: ModuleType) -> None:
    """What is captured differs, so that canonicalization has something to do; then it is the same again."""
    case = ModelCase("small", seeded(Small()), (noise(2, 5, 16),), (noise(2, 5, 16),), (None,))
    expected = canonicalize(capture(case.module, case.args)).program
    spelling = spellings.SPELLINGS[name]
    with spelling.context():
        captured = capture(spelling.rewrite(Small(), case), case.args)
    names = {".".join(str(n.target).split(".")[1:2]) for n in captured.graph.nodes}
    present, absent = OPERATORS[name]
    assert present in names
    assert absent not in names
    found = spelling.program(case)
    assert spellings.outline(analyse(found)) == spellings.outline(analyse(expected))
    if name != "all":
        assert found.operator_count == expected.operator_count


@pytest.mark.parametrize(("name", "linears"), [("fused", 4), ("fused heads", 4)])
def test_linears_that_read_one_value_become_one(name: str, linears: int, spellings: ModuleType) -> None:
    case = ModelCase("small", seeded(Small()), (noise(2, 5, 16),), (noise(2, 5, 16),), (None,))
    found = spellings.SPELLINGS[name].program(case)
    assert sum(n.target is torch.ops.aten.linear.default for n in found.graph.nodes) == linears
    torch.testing.assert_close(found(*case.args), case.module(*case.args))
