"""Constant factors of a linear's outputs go into its weight, and when they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

FOLDED: dict[str, Callable[..., Tensor]] = {
    "vector": lambda x, w, b, c: F.linear(x, w, b) * c,
    "vector first": lambda x, w, b, c: c * F.linear(x, w, b),
    "number": lambda x, w, b, c: F.linear(x, w, b) * 0.125,
    "quotient": lambda x, w, b, c: F.linear(x, w, b) / c,
    "two": lambda x, w, b, c: F.linear(x, w, b) * c * 3.0,
}


@pytest.mark.parametrize("spelling", FOLDED)
def test_factors_are_folded(spelling: str, canonical: Any, of: Any) -> None:
    module = of(FOLDED[spelling], w=torch.randn(6, 8), b=torch.randn(6), c=torch.rand(6) + 0.5)
    found = canonical(module, torch.randn(2, 3, 8))
    assert found.text == "%0 = linear(inputs_0, c[6,8], c[6])\nreturn [%0]"
    assert found.error < 1e-6


def test_a_bias_behind_the_factor_becomes_the_bias(canonical: Any, of: Any) -> None:
    module = of(
        lambda x, w, c, b: F.linear(x, w) * c + b, w=torch.randn(6, 8), c=torch.randn(6), b=torch.randn(6)
    )
    assert canonical(module, torch.randn(3, 8)).text == "%0 = linear(inputs_0, c[6,8], c[6])\nreturn [%0]"


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "weight with other readers": (
        lambda x, w, c: (F.linear(x, w) * c, F.linear(x + 1, w)),
        "the weight of the linear has other readers, so a scaled copy would be stored beside it",
    ),
    "computed bias": (
        lambda x, w, c: F.linear(x, w, x[0, :6]) * c,
        "the weight or the bias of the linear is computed by the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, canonical: Any, of: Any) -> None:
    call, reason = REFUSED[case]
    found = canonical(of(call, w=torch.randn(6, 8), c=torch.randn(6)), torch.randn(3, 8))
    assert "mul.Tensor(" in found.text
    assert reason in found.refused


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, c: F.linear(x, w) * c[:3, None],  # a factor for each row
        lambda x, w, c: F.linear(x, w) * (c / 0.0),  # infinite
        lambda x, w, c: c / F.linear(x, w),
        lambda x, w, c: (F.linear(x, w) / 0.02).round(),  # the step of a rounding
        lambda x, w, c: (F.linear(x, w) * 50.0 + 3).round(),
        lambda x, w, c: F.linear(x, w)[None] * c.view(1, 1, 6).expand(2, 3, 6).contiguous(),
    ],
)
def test_what_is_no_factor_of_the_outputs_stays(call: Callable[..., Any], canonical: Any, of: Any) -> None:
    found = canonical(of(call, w=torch.randn(6, 8), c=torch.rand(6) + 0.5), torch.randn(3, 8))
    assert "mul.Tensor(" in found.text or "div.Tensor(" in found.text
