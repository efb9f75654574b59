"""Keys and values are rounded per token and head, where attentions read them, and attention fusion copes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import RecipeError
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.compiler.recipe import CacheFormat, LayerRule, Recipe
from isofold.passes.fuse_attention import fuse_attention
from isofold.passes.layers import check_recipe
from isofold.passes.pipeline import plan
from isofold.passes.quantize_cache import quantize_cache

OPS: Any = torch.ops.isofold
Count = Callable[[Program], Counter[str]]


class Attention(nn.Module):
    """Rotated queries and keys, two key heads for four query heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        angle = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (heads, 8)).transpose(1, 2)
            for layer, heads in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        q, k = (OPS.rotary(y, self.cos[None, None], self.sin[None, None], 1, -1, False) for y in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Two(nn.Module):
    """Two attentions of one key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Reader(), Reader()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.first(q, k, v) + self.second(q.tanh(), k, v)


class Reader(nn.Module):
    """One attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
HEADS = torch.randn(3, 2, 3, 7, 8, generator=torch.Generator().manual_seed(1)).unbind()


def attended(bits: int | None) -> Tensor:
    """What the module computes with keys and values rounded by the formula."""
    module = Attention()
    original = F.scaled_dot_product_attention

    def rounded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if bits is not None:
            k, v = (OPS.quantize_dequantize(x, None, "token", bits) for x in (k, v))
        return original(q, k, v, **options)

    F.scaled_dot_product_attention = rounded
    try:
        return module(X).detach()
    finally:
        F.scaled_dot_product_attention = original


@pytest.mark.parametrize("bits", [4, 8])
def test_keys_are_rounded_after_rotary_and_both_per_head(counts: Count, bits: int) -> None:
    program = capture(Attention().eval(), (X,))
    chosen = Recipe(kv=CacheFormat(bits=bits))
    after, (_, report) = run_steps(program, [Step(canonicalize), Step(quantize_cache, {"recipe": chosen})])
    assert counts(after)["quantize_dequantize"] == 2
    assert report.applied[0].facts == {"bits": bits, "head_size": 8}
    assert torch.allclose(after(X), attended(bits), atol=1e-6)
    moved = float((after(X) - attended(None)).abs().max())
    assert {4: 1e-2, 8: 1e-4}[bits] < moved < {4: 0.5, 8: 0.05}[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_attention_is_fused_through_the_quantizers(counts: Count, bits: int) -> None:
    program = capture(Attention().eval(), (X,))
    after, reports = run_steps(program, plan(program, Recipe(kv=CacheFormat(bits=bits))))
    (fused,) = [r for r in reports if r.name == "fuse_attention"]
    assert fused.applied[0].facts["transposes_left"] == 1  # the module returns [B, H, S, D] itself
    assert counts(after)["attention"] == 1
    (node,) = [n for n in after.graph.nodes if n.target == OPS.attention.default]
    for name in ("k", "v"):
        assert argument(node, name).target == OPS.quantize_dequantize.default
    assert argument(argument(node, "k").args[0], "head_dim_index") == 2
    assert torch.allclose(after(X), attended(bits), atol=1e-6)


def test_a_quantizer_of_a_whole_sample_keeps_its_own_exchange(counts: Count) -> None:
    """Only because the batch comes first does it commute; a per-sample pair is not what `token` fusions rely on."""

    class Sample(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            k = OPS.quantize_dequantize(k, None, "sample", 8)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    program = capture(Sample(), HEADS)
    after, (_, report) = run_steps(program, [Step(canonicalize), Step(fuse_attention)])
    assert report.error is not None
    assert report.error < 1e-12
    assert counts(after)["transpose"] == 2


def test_attentions_of_one_value_share_its_codes_and_rules_choose(counts: Count) -> None:
    program = capture(Two(), HEADS)
    both = quantize_cache(program, recipe=Recipe(kv=CacheFormat(bits=4))).program
    assert counts(both)["quantize_dequantize"] == 2
    rules = [LayerRule(match="second", kv=CacheFormat(bits=8))]
    mixed = quantize_cache(program, recipe=Recipe(kv=CacheFormat(bits=4), layers=rules)).program
    assert sorted(
        argument(n, "bits") for n in mixed.graph.nodes if n.target == OPS.quantize_dequantize.default
    ) == [4, 4, 8, 8]
    one = quantize_cache(program, recipe=Recipe(layers=rules)).program
    assert counts(one)["quantize_dequantize"] == 2
    check_recipe(program, recipe=Recipe(layers=rules))
    with pytest.raises(RecipeError, match="did you mean 'second'"):
        check_recipe(program, recipe=Recipe(kv=CacheFormat(), layers=[LayerRule(match="secnd", kv=None)]))
    with pytest.raises(RecipeError, match="quantizes nothing"):
        check_recipe(capture(nn.Linear(3, 4), (torch.randn(2, 3),)), recipe=Recipe(kv=CacheFormat()))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (tuple(x.double() for x in HEADS), "torch.float64, not float32"),
        (tuple(x[0] for x in HEADS), "3 dimensions, so none of heads"),
        ((HEADS[0], *(OPS.quantize_dequantize(x, None, "token", 8) for x in HEADS[1:])), None),
    ],
)
def test_refusals(args: tuple[Tensor, ...], reason: str | None) -> None:
    result = quantize_cache(capture(Reader(), args), recipe=Recipe(kv=CacheFormat(bits=4)))
    if reason is None:
        assert len(result.report.applied) == 1
        again = quantize_cache(result.program, recipe=Recipe(kv=CacheFormat(bits=4))).report
        assert not again.applied
        assert all("already quantized" in r.reason for r in again.refused)
        return
    assert not result.report.applied
    assert all(reason in r.reason for r in result.report.refused)
    assert len(result.report.refused) == 2
