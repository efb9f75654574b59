"""Caches that are codes: written once, joined, read by attention as they are, as a state that goes in and out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import isofold
from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.recipe import Recipe
from isofold.passes.fuse_attention import fuse_attention
from isofold.passes.quantize_cache import quantize_cache

OPS = torch.ops.isofold
DEPTH, HEADS, GROUPS = 32, 4, 2


class Decoder(nn.Module):
    """An attention whose cache of `bits` is an argument and a result; 0: floats."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.q, self.k, self.v = (nn.Linear(48, n * DEPTH) for n in (HEADS, GROUPS, GROUPS))
        self.o = nn.Linear(HEADS * DEPTH, 48)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        q, k, v = (f(x).unflatten(-1, (-1, DEPTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.bits:
            new = [part for value in (k, v) for part in OPS.quantize_cache(value, None, self.bits)]
            state = [torch.cat(pair, 2) for pair in zip(past, new, strict=True)]
            k, v = (OPS.dequantize_cache(*state[i : i + 2], DEPTH, self.bits) for i in (0, 2))
        else:
            state = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)]
            k, v = state
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return (self.o(y.transpose(1, 2).flatten(2)), *state)


def empty(bits: int, tokens: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(tokens)
    floats = [torch.randn(1, GROUPS, tokens, DEPTH, generator=g) for _ in range(2)]
    return (
        tuple(part for x in floats for part in OPS.quantize_cache(x, None, bits)) if bits else tuple(floats)
    )


def decoder(bits: int) -> Decoder:
    torch.manual_seed(0)
    return Decoder(bits).eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("recipe", ["float32", "w8a8"])
def test_a_cache_of_codes_goes_in_and_out_of_a_compiled_model(bits: int, recipe: str) -> None:
    model, past = decoder(bits), empty(bits, 6)
    token = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(1))
    grows = {2: Dim("past", min=1, max=4096)}
    compiled = isofold.compile(
        model, (token, past), dynamic_shapes=(None, (grows,) * 4), recipe=recipe, measure=False
    )
    kinds = Counter(entry["op"] for entry in compiled.profile(runs=1))
    assert kinds["CachedAttention"] == 1
    assert not kinds["DequantizeCache"] + kinds["Attention"]
    state, wanted_state = past, past
    for step in range(4):
        x = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(2 + step))
        got, *state = (torch.as_tensor(t) for t in compiled(x, tuple(state)))
        wanted, *wanted_state = model(x, tuple(wanted_state))
        assert state[0].dtype == torch.uint8
        assert state[0].shape == (1, GROUPS, 7 + step, DEPTH * bits // 8)
        bound = 1e-4 if recipe == "float32" else 0.05
        assert float((got - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
def test_codes_are_near_to_floats(bits: int, bound: float) -> None:
    x = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(1))
    exact = decoder(0)(x, empty(0, 200))[0]
    rounded = decoder(bits)(x, empty(bits, 200))[0]
    assert 0 < float((rounded - exact).norm() / exact.norm()) < bound


def test_a_shift_of_keys_needs_no_undoing_and_a_rotation_has_its_partner() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, DEPTH, generator=g) for n in (3, 50, 50))
    k = k + 4 * torch.randn(DEPTH, generator=g)  # channels with means of their own
    k[..., 5] *= 20
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for shift, orders in ((None, []), (k.mean((0, 1, 2)), []), (k.mean((0, 1, 2)), [32])):
        keys = OPS.dequantize_cache(*OPS.quantize_cache(k, shift, 4, orders), DEPTH, 4)
        turned = OPS.hadamard(q, orders, False)
        errors.append(float((F.scaled_dot_product_attention(turned, keys, v) - exact).norm()))
    assert errors[2] < 0.85 * errors[1]
    assert errors[1] < 0.95 * errors[0]


def test_attention_reads_codes_only_where_both_are_codes_of_one_width() -> None:
    class Mixed(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys = OPS.dequantize_cache(*OPS.quantize_cache(k, None, 4), DEPTH, 4)
            values = OPS.dequantize_cache(*OPS.quantize_cache(v, None, 8), DEPTH, 8)
            return F.scaled_dot_product_attention(q, keys, values)

    args = tuple(torch.randn(1, 2, 5, DEPTH) for _ in range(3))
    program, _ = run_steps(capture(Mixed(), args), [Step(canonicalize), Step(fuse_attention)])
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert OPS.attention.default in targets
    assert OPS.attention_cached.default not in targets
    assert torch.allclose(program(*args), Mixed()(*args), atol=1e-5)


def test_a_recipe_does_not_round_codes_again() -> None:
    model, past = decoder(4), empty(4, 6)
    program = canonicalize(capture(model, (torch.randn(1, 1, 48), past))).program
    recipe = Recipe.model_validate({"kv": {"bits": 4}})
    done, (report,) = run_steps(program, [Step(quantize_cache, {"recipe": recipe})])
    assert not report.applied
    assert {entry.reason.split(": ")[1] for entry in report.refused} == {"they are already quantized"}
    assert all(argument(n, "bits") == 4 for n in done.graph.nodes if n.target == OPS.dequantize_cache.default)
