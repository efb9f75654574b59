"""A tensor that is filled in place, part by part, is a concatenation; one that is not filled stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

DYNAMIC = ({0: Dim("rows", min=2, max=64)},)


def filled(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], 7)
    y[:, 4:] = x[:, :3]
    y[:, :4] = x[:, 2:6]
    return y


def filled_twice(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], 7)
    y[:, :5] = x[:, :5]
    y[:, 4:] = x[:, :3]
    return y


def in_part(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


def test_filled_parts_are_joined_in_order(canonical: Any, of: Any) -> None:
    found = canonical(of(filled), torch.randn(5, 6), dynamic_shapes=(DYNAMIC,))
    assert [line.split(" = ")[1].split("(")[0] for line in found.text.splitlines()[:-1]] == [
        "slice.Tensor", "slice.Tensor", "cat",
    ]  # fmt: skip
    assert "2 parts that fill a tensor are a concatenation" in found.applied


@pytest.mark.parametrize("run", [filled_twice, in_part])
def test_what_overlaps_or_is_not_filled_stays(run: Any, canonical: Any, of: Any) -> None:
    found = canonical(of(run), torch.randn(5, 6), dynamic_shapes=(DYNAMIC,))
    assert "slice_scatter" in found.text
