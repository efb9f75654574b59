"""Attention against the dialect's reference: shapes, masks, grouped heads, fused inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Check = Callable[..., None]
Run = Callable[..., list[Tensor]]


def arguments(
    shape: tuple[int, int, int, int, int, int, int],
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    softcap: float = 0.0,
) -> list[object]:
    batch, queries, keys, heads, kv_heads, d, dv = shape
    q, k = torch.randn(batch, queries, heads, d), torch.randn(batch, keys, kv_heads, d)
    v = torch.randn(batch, keys, kv_heads, dv)
    return [q, k, v, mask, heads, kv_heads, 0, 0, 0, d**-0.5, causal, softcap]


SHAPES = [
    (1, 128, 128, 2, 2, 64, 64),
    (2, 33, 17, 4, 2, 20, 24),
    (1, 5, 300, 2, 1, 64, 48),
    (1, 40, 259, 1, 1, 7, 5),
    (2, 70, 130, 2, 2, 80, 96),
    (3, 200, 150, 16, 16, 8, 12),  # many tasks: several groups of queries in one
    (1, 1, 77, 3, 3, 24, 40),  # decoding
    (2, 1, 150, 8, 2, 32, 32),  # decoding, heads share keys: heads are the rows
    (1, 3, 3, 2, 1, 16, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(check: Check, shape: tuple[int, int, int, int, int, int, int], causal: bool) -> None:
    check("attention", arguments(shape, causal=causal), threads=2)
    check("attention", arguments(shape, causal=causal, softcap=3.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_broadcast_on_every_dimension(
    check: Check, shape: tuple[int, int, int, int, int, int, int]
) -> None:
    batch, queries, keys, heads = shape[:4]
    for dims in [(batch, heads, queries, keys), (1, 1, queries, keys), (batch, 1, 1, keys), (1, heads, 1, 1),
                 (1, 1, queries, 1), (queries, keys), (keys,)]:  # fmt: skip
        check("attention", arguments(shape, torch.randn(dims)))
        check("attention", arguments(shape, torch.rand(dims) > 0.4))
        check("attention", arguments(shape, torch.rand(dims) > 0.4, causal=True))


@pytest.mark.parametrize("queries", [1, 2, 40])
def test_a_row_that_sees_nothing_is_zero(run_operator: Run, queries: int) -> None:
    shape = (1, queries, 150, 2, 2, 16, 16)
    for mask in (torch.zeros(1, 1, 1, 150, dtype=torch.bool), torch.full((1, 1, 1, 150), float("-inf"))):
        assert not run_operator("attention", arguments(shape, mask))[0].any()
    partly = torch.ones(1, 1, queries, 150, dtype=torch.bool)
    partly[:, :, 0] = False
    y = run_operator("attention", arguments(shape, partly))[0]
    assert not y[:, 0].any()
    assert bool(y[:, 1:].any()) == (queries > 1)


def test_a_finite_but_huge_mask_is_not_a_row_that_sees_nothing(check: Check) -> None:
    mask = torch.full((1, 1, 1, 60), torch.finfo(torch.float32).min)
    call = arguments((1, 20, 60, 2, 2, 16, 16), mask)
    call[0] = torch.zeros_like(call[0])  # type: ignore[call-overload] # the query tensor
    check("attention", call)


def test_keys_seen_only_after_the_first_block(check: Check) -> None:
    mask = torch.zeros(1, 1, 40, 300, dtype=torch.bool)
    mask[..., 290:] = True
    check("attention", arguments((1, 40, 300, 2, 2, 32, 32), mask))


def test_large_logits(check: Check) -> None:
    call = arguments((1, 20, 200, 1, 1, 16, 16))
    call[0] = call[0] * 100  # type: ignore[operator] # the query tensor
    check("attention", call, tolerance=1e-4)


@pytest.mark.parametrize("queries", [1, 2, 50])
def test_one_fused_tensor_holds_queries_keys_and_values(check: Check, queries: int) -> None:
    heads, kv_heads, d = 6, 3, 24
    qkv = torch.randn(2, queries, heads + 2 * kv_heads, d)
    tail = [heads, kv_heads, 0, heads, heads + kv_heads, 0.2, True, 0.0]
    check("attention", [qkv, qkv, qkv, None, *tail])


def test_empty(run_operator: Run) -> None:
    assert run_operator("attention", arguments((0, 4, 5, 2, 2, 16, 16)))[0].shape == (0, 4, 2, 16)
    assert run_operator("attention", arguments((1, 0, 5, 2, 2, 16, 16)))[0].shape == (1, 0, 2, 16)
    assert not run_operator("attention", arguments((1, 20, 0, 2, 2, 16, 16)))[0].any()
    assert not run_operator("attention", arguments((1, 1, 0, 2, 2, 16, 16)))[0].any()
