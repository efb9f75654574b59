"""Scatter reductions and bags of embeddings: values, what is left, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("how", ["sum", "mean", "amax", "amin", "prod"])
def test_reductions_count_what_was_there(how: str, kept: bool, canonical: Any, of: Any) -> None:
    def scattered(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        return x.scatter_reduce(0, index, values, how, include_self=kept)

    index = torch.tensor([[0, 1], [0, 3], [3, 3]])
    found = canonical(of(scattered), torch.randn(5, 2), index, torch.randn(3, 2))
    assert ("include_self=True" in found.text) == (how in ("amax", "amin", "prod") and not kept)
    assert "mean" not in found.text
    assert "False)" not in found.text


def test_integers_are_refused(canonical: Any, of: Any) -> None:
    index = torch.tensor([0, 0, 2])
    found = canonical(
        of(lambda x, v: x.scatter_reduce(0, index, v, "mean")), torch.arange(4), torch.arange(3) + 1
    )
    assert found.refused == ["a mean of integers, without what was there"]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_size(mode: str, canonical: Any, of: Any) -> None:
    table = torch.randn(20, 8)
    for shapes in (None, (({0: Dim("batch", min=1, max=9)},),)):
        found = canonical(
            of(lambda ids, w: F.embedding_bag(ids, w, mode=mode), w=table),
            torch.randint(0, 20, (4, 3)),
            dynamic_shapes=shapes,
        )
        assert "embedding(c[20,8]" in found.text
        assert "embedding_bag" not in found.text


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_any_sizes(mode: str, last: bool, canonical: Any, of: Any) -> None:
    def bags(ids: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
        return F.embedding_bag(ids, w, offsets, mode=mode, include_last_offset=last)

    # An empty bag, in the middle.
    offsets = torch.tensor([0, 2, 2, 5, *([7] if last else [])])
    found = canonical(of(bags, w=torch.randn(20, 8)), torch.randint(0, 20, (7,)), offsets)
    assert "embedding(c[20,8]" in found.text
    assert "embedding_bag" not in found.text


def test_weights_of_samples(canonical: Any, of: Any) -> None:
    def weighted(ids: Tensor, each: Tensor, w: Tensor) -> Tensor:
        return F.embedding_bag(ids, w, per_sample_weights=each, mode="sum")

    found = canonical(of(weighted, w=torch.randn(20, 8)), torch.randint(0, 20, (4, 3)), torch.rand(4, 3))
    assert "embedding_bag" not in found.text


def test_bags_that_stay(canonical: Any, of: Any) -> None:
    offsets = torch.tensor([0, 2, 2])
    padded = canonical(
        of(lambda ids, w: F.embedding_bag(ids, w, mode="sum", padding_idx=3), w=torch.randn(20, 8)),
        torch.randint(0, 20, (4, 3)),
    )
    assert padded.refused == ["a padding index is left out of the bags"]
    largest = canonical(
        of(lambda ids, o, w: F.embedding_bag(ids, w, o, mode="max"), w=torch.randn(20, 8)),
        torch.randint(0, 20, (7,)),
        offsets,
    )
    assert largest.refused == ["the largest rows of bags of several sizes have no form without a loop"]
