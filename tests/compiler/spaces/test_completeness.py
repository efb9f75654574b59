"""No legal fold is missed: the symmetries that the analysis finds are all that a random point of a model has.

The null space of d(outputs) / d(parameters), over many inputs and in float64, holds every direction in which the
parameters can move without a change of the outputs. Its dimension must be the one that the spaces predict, and the
predicted directions must lie in it. Vocabularies are larger than what they are looked up for, weights of size one and
eps large, so that nothing else is nearly flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.program import Program
from isofold.compiler.spaces.analysis import RULES, Analysis
from isofold.compiler.spaces.dimension import learned, symmetry_dimension

aten = torch.ops.aten
SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 0.1}


class Logits(nn.Module):
    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, **self.options).logits


def llama(tied: bool) -> nn.Module:
    config = hf.LlamaConfig(**GROUPED, tie_word_embeddings=tied)
    return Logits(hf.LlamaForCausalLM(config), use_cache=False)


def qwen3() -> nn.Module:
    return Logits(hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)), use_cache=False)


def gemma2() -> nn.Module:
    options = {**GROUPED, "attn_implementation": "eager"}
    config = hf.Gemma2Config(**options, query_pre_attn_scalar=4, tie_word_embeddings=False)
    return Logits(hf.Gemma2ForCausalLM(config), use_cache=False)


def phi3() -> nn.Module:
    return Logits(hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)), use_cache=False)


def gpt_neox() -> nn.Module:
    config = hf.GPTNeoXConfig(**{**SIZES, "vocab_size": 24}, rotary_pct=0.5, layer_norm_eps=0.1)
    return Logits(hf.GPTNeoXForCausalLM(config), use_cache=False)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=12, n_embd=8, n_inner=6, n_layer=2, n_head=2, n_positions=6, layer_norm_epsilon=0.1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Logits(hf.GPT2LMHeadModel(config), use_cache=False)


def mpt() -> nn.Module:
    config = hf.MptConfig(
        vocab_size=12, d_model=8, expansion_ratio=1, n_heads=2, n_layers=2, max_seq_len=16, layer_norm_epsilon=0.1
    )  # fmt: skip
    return Logits(hf.MptForCausalLM(config), use_cache=False)


def opt() -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=24, hidden_size=8, ffn_dim=6, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=8, pad_token_id=None, attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    return Logits(hf.OPTForCausalLM(config), use_cache=False)


def bert() -> nn.Module:
    return Logits(hf.BertForMaskedLM(hf.BertConfig(**SIZES, layer_norm_eps=0.1, tie_word_embeddings=False)))


def vit() -> nn.Module:
    config = hf.ViTConfig(
        image_size=4, patch_size=2, num_channels=2, hidden_size=8, intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, layer_norm_eps=0.1, num_labels=5, attn_implementation="sdpa",
    )  # fmt: skip
    return Logits(hf.ViTForImageClassification(config))


class Chosen(nn.Module):
    """A block of gated experts on a stream; shares by sigmoid, which sees a common term of all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.RMSNorm(8, eps=0.1), nn.RMSNorm(8, eps=0.1)
        self.router, self.head = nn.Linear(8, 3, bias=False), nn.Linear(8, 12, bias=False)
        self.gate_up, self.down = nn.Parameter(torch.zeros(3, 8, 8)), nn.Parameter(torch.zeros(3, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rows = self.norm(x)
        shares, ids = self.router(rows).sigmoid().topk(2, -1)
        rows, ids = rows.repeat_interleave(2, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[ids], rows[..., None])[..., 0].chunk(2, -1)
        y = torch.bmm(self.down[ids], (nn.functional.silu(gate) * up)[..., None])[..., 0]
        return self.head(self.last(x + (y * shares.reshape(-1, 1)).reshape(-1, 2, 8).sum(1)))


class Translation(nn.Module):
    """Ids of the source and of the target, `[batch, 6 + 5]`, to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # autograd would not see that row
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x[:, :6], decoder_input_ids=x[:, 6:], use_cache=False).logits


def t5(tied: bool) -> nn.Module:
    config = hf.T5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=6, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        layer_norm_epsilon=0.1, relative_attention_num_buckets=8, relative_attention_max_distance=6,
        tie_word_embeddings=True, decoder_start_token_id=0,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return Translation(model)


def pairs(index: int) -> Tensor:
    return torch.randint(0, 12, (4, 11), generator=torch.Generator().manual_seed(index))


def ids(index: int, vocabulary: int = 12) -> Tensor:
    return torch.randint(0, vocabulary, (4, 6), generator=torch.Generator().manual_seed(index))


def more_ids(index: int) -> Tensor:
    return ids(index, 24)


def images(index: int) -> Tensor:
    return torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def rows(index: int) -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


#: Architecture: how it is built, its inputs, how many of them, how large weights are.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int, float]] = {
    "llama": (lambda: llama(False), ids, 6, 0.7),
    "llama, tied": (lambda: llama(True), ids, 6, 0.7),
    "qwen3": (qwen3, ids, 6, 0.7),
    "gemma2": (gemma2, ids, 6, 0.7),
    "phi3": (phi3, ids, 6, 0.7),
    "gpt_neox": (gpt_neox, more_ids, 5, 0.7),
    "gpt2": (gpt2, ids, 7, 0.7),
    "mpt": (mpt, ids, 14, 0.7),
    "opt": (opt, more_ids, 6, 0.5),
    "experts": (Chosen, rows, 2, 0.7),
    "bert": (bert, ids, 8, 0.4),
    "vit": (vit, images, 5, 0.7),
    "t5": (lambda: t5(False), pairs, 7, 0.6),
    "t5, tied": (lambda: t5(True), pairs, 7, 0.6),
}


def program_of(name: str) -> tuple[Program, list[Tensor]]:
    """The canonical program in float64 with random parameters, and its inputs."""
    build, make, count, size = MODELS[name]
    torch.manual_seed(0)
    module = build().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(size * noise) if parameter.dim() > 1 else parameter.add_(0.4 * noise)
    inputs = [make(index) for index in range(count)]
    # Static where the batch would reach the tables of a mask, which are constants.
    dynamic = None if name in ("mpt", "gemma2") else ({0: Dim("batch", min=1, max=1024)},)
    program = canonicalize(capture(module, (inputs[0],), None, dynamic)).program
    tensors = {
        key: held.double() if isinstance(held, Tensor) and held.is_floating_point() else held
        for key, held in program.tensors.items()
    }
    return Program(program.graph, tensors, (inputs[0],), None, program.dynamic_shapes), inputs


def jacobian(program: Program, inputs: Sequence[Tensor]) -> Tensor:
    """d(outputs) / d(learned parameters), float64 `[outputs of all inputs, parameters]`."""
    names = learned(program)
    leaves = [program.tensors[name].detach().clone().requires_grad_() for name in names]
    module = fx.GraphModule({**program.tensors, **dict(zip(names, leaves, strict=True))}, program.graph)
    rows = []
    for x in inputs:
        outputs = [y for y in pytree.tree_leaves(module(x)) if y.is_floating_point()]
        flat = torch.cat([y.flatten() for y in outputs])
        for units in torch.eye(len(flat), dtype=flat.dtype).split(256):
            found = torch.autograd.grad(
                flat, leaves, units, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            filled = [
                torch.zeros(len(units), p.numel(), dtype=flat.dtype)
                if g is None
                else g.reshape(len(units), -1)
                for g, p in zip(found, leaves, strict=True)
            ]
            rows.append(torch.cat(filled, 1))
    return torch.cat(rows)


def nullity(matrix: Tensor) -> tuple[int, float, float]:
    """The dimension of the null space, and the singular values on both sides of the gap, relative to the largest."""
    values = torch.linalg.svdvals(matrix / torch.linalg.vector_norm(matrix, dim=0))
    values = torch.cat([values, torch.zeros(max(0, matrix.shape[1] - len(values)), dtype=values.dtype)])
    values = values / values[0]
    rank = int((values > 1e-12).sum())
    return len(values) - rank, float(values[rank - 1]), float(values[rank]) if rank < len(values) else 0.0


@pytest.mark.parametrize("name", MODELS)
def test_all_symmetries_are_found(name: str) -> None:
    program, inputs = program_of(name)
    point = symmetry_dimension(program).program
    matrix = jacobian(point, inputs)
    live = matrix.abs().amax(0) > 1e-12
    assert matrix.shape[0] > int(live.sum()), "too few outputs to see every parameter"
    predicted = symmetry_dimension(program, live)
    found, above, below = nullity(matrix[:, live])
    assert above > 100 * below
    assert predicted.total == found, predicted.by_kind
    assert float((matrix @ predicted.basis.mT).abs().max() / matrix.abs().max()) < 1e-11


def test_a_rule_that_is_too_strict_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin more than needed: fewer symmetries are predicted than there are."""
    original = RULES[aten.scaled_dot_product_attention.default]

    def strict(analysis: Analysis, node: fx.Node) -> None:
        original(analysis, node)
        analysis.pin(node, node.args[2], "values")  # type: ignore[arg-type]  # a node

    before = symmetry_dimension(program_of("llama")[0])
    monkeypatch.setitem(RULES, aten.scaled_dot_product_attention.default, strict)
    after = symmetry_dimension(program_of("llama")[0])
    assert before.by_kind["general"] == 32
    assert "general" not in after.by_kind
    assert before.total - after.total == 32


def test_llama_is_what_theory_says() -> None:
    """d 8, 2 layers, 2 query heads of 4 that share one key/value head, 6 hidden channels."""
    found = symmetry_dimension(program_of("llama")[0])
    assert found.by_kind["orthogonal"] == 8 * 7 // 2
    assert found.by_kind["pair"] == 2 * 4
    assert found.by_kind["general"] == 2 * 4 * 4
    assert found.by_kind["scale"] == 5 * 8 + 2 * 6
    assert found.total == 120
