"""Groups inside a head of cached keys and values: each is a short head, whatever the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from isofold.compiler.errors import InputError

OPS: Any = torch.ops.isofold


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("depth", "group"), [(64, 32), (192, 64), (96, 96), (128, 32)])
def test_groups_are_short_heads(bits: int, depth: int, group: int) -> None:
    x = random(2, 3, 5, depth)
    x[..., 1] *= 30  # one loud channel
    codes, pairs = OPS.quantize_cache(x, None, bits, [], group)
    assert pairs.shape == (2, 3, 5, 2 * depth // group)
    short = x.unflatten(-1, (-1, group))
    expected = OPS.quantize_cache(short, None, bits)
    assert torch.equal(codes, expected[0].flatten(-2))
    assert torch.equal(pairs, expected[1].flatten(-2))
    back = OPS.dequantize_cache(codes, pairs, depth, bits, group)
    assert torch.equal(back, OPS.quantize_dequantize(short, None, "token", bits).flatten(-2))
    whole = OPS.dequantize_cache(*OPS.quantize_cache(x, None, bits), depth, bits)
    if group < depth:  # what is not in the loud group is rounded finer
        quiet = slice(group, None)
        assert float((back - x)[..., quiet].norm()) < 0.3 * float((whole - x)[..., quiet].norm())


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_is_that_of_the_floats_they_stand_for(bits: int) -> None:
    q, k, v = random(2, 3, 4, 64), random(2, 2, 9, 64, seed=1), random(2, 2, 9, 96, seed=2)
    keys, values = (OPS.quantize_cache(x, None, bits, [], 32) for x in (k, v))
    y = OPS.attention_cached(q, *keys, *values, None, 4, 2, 64, 96, bits, 0, 0.125, False, 0.0, 32)
    floats = [OPS.dequantize_cache(*t, x.shape[-1], bits, 32) for t, x in ((keys, k), (values, v))]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *floats, enable_gqa=True, scale=0.125)
    assert torch.allclose(y, expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "group", "message"),
    [(80, 32, "a multiple of 32 that divides 80"), (64, 16, "a multiple of 32"), (64, 128, "divides 64")],
)
def test_groups_that_do_not_fit_are_errors(depth: int, group: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OPS.quantize_cache(random(2, depth), None, 8, [], group)
    codes, pairs = OPS.quantize_cache(random(2, depth), None, 8)
    with pytest.raises(InputError, match=message):
        OPS.dequantize_cache(codes, pairs, depth, 8, group)


@pytest.mark.parametrize(("shift", "orders"), [(random(64), []), (None, [64])])
def test_transforms_stand_in_front_of_groups(shift: Tensor | None, orders: list[int]) -> None:
    with pytest.raises(InputError, match="in front of it"):
        OPS.quantize_cache(random(2, 64), shift, 4, orders, 32)
