"""Integers made of rounded floats become floats; zero points and row scales go in front of the linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

ROUND_TRIPS = {
    "int8": lambda x: torch.round(x / 0.1).clamp(-128, 127).to(torch.int8).to(torch.float32) * 0.1,
    "uint8": lambda x: ((torch.round(x / 0.1) + 7).clamp(0, 255).to(torch.uint8).float() - 7) * 0.1,
    "by minimum": lambda x: (
        torch.minimum(torch.floor(x).clamp_min(-8), torch.full_like(x, 7.0)).to(torch.int8).float() * 0.5
    ),
    "integer arithmetic": lambda x: (
        (torch.round(x).clamp(-128, 127).to(torch.int8).to(torch.int32) + 128).to(torch.uint8).float()
    ),
    "mixed": lambda x: torch.round(x) + torch.round(x[:, :1]).clamp(-9, 9).to(torch.int8),
    "difference": lambda x: (
        (torch.round(x).clamp(0, 255).to(torch.uint8) - torch.round(x[:, :1]).clamp(0, 9).to(torch.int64))
        * 0.3
    ),
    "views": lambda x: torch.round(x).clamp(0, 255).to(torch.uint8).reshape(-1, 4).t().float(),
    "relu": lambda x: F.relu(torch.round(x)).clamp(max=255).to(torch.uint8).float(),
}


@pytest.mark.parametrize("spelling", ROUND_TRIPS)
def test_rounded_floats_stay_floats(spelling: str, canonical: Any, of: Any) -> None:
    function = ROUND_TRIPS[spelling]
    found = canonical(of(function), torch.randn(5, 8) * 20, dynamic_shapes=(({0: Dim("rows")},),))
    assert "int" not in found.text.replace("inputs", "")
    x = torch.randn(3, 8) * 20
    torch.testing.assert_close(found.program(x), function(x))


WRAPS = {
    "fractions": (lambda x: x.clamp(-9, 9).to(torch.int8).float(), "cuts off fractions"),
    "no clamp": (lambda x: torch.round(x).to(torch.int8).float(), "may wrap: its source is in [-inf, inf]"),
    "too wide": (lambda x: torch.round(x).clamp(-128, 128).to(torch.int8).float(), "source is in [-128, 128]"),
    "half a clamp": (lambda x: (torch.round(x).clamp(-8, 7) + 0.5).to(torch.int8).float(), "cuts off fractions"),
    "sum": (
        lambda x: (torch.round(x).clamp(0, 127).to(torch.int8) + 1).float(),
        "may wrap: it is in [1, 128]",
    ),
    "unsigned": (
        lambda x: (torch.round(x).clamp(0, 127).to(torch.uint8) - 1).float(),
        "may wrap: it is in [-1, 126]",
    ),
    "shift": (lambda x: (torch.round(x).clamp(0, 9).to(torch.int32) << 1).float(), "no spelling in floats"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPS)
def test_what_may_wrap_stays_an_integer(case: str, canonical: Any, of: Any) -> None:
    function, reason = WRAPS[case]
    found = canonical(of(function), torch.randn(3, 8) * 100)
    assert any(reason in entry for entry in found.refused)
    assert "int" in found.text.replace("inputs", "")


def test_sums_that_a_half_cannot_hold_stay_integers(canonical: Any, of: Any) -> None:
    def product(x: Tensor) -> Tensor:
        codes = torch.round(x / 0.1).clamp(-128, 127).to(torch.int8)
        return torch._int_mm(codes, CODES.t()).to(torch.bfloat16)

    found = canonical(of(product), torch.randn(20, 16))
    assert any("where not all whole numbers are torch.bfloat16" in entry for entry in found.refused)
    assert "_int_mm" in found.text


def test_positions_and_masks_stay_integers(canonical: Any, of: Any) -> None:
    function = lambda x, m: x + torch.arange(x.shape[1]).float() + (m.cumsum(1) - 1).float()  # noqa: E731
    found = canonical(of(function), torch.randn(3, 8), torch.ones(3, 8, dtype=torch.int64))
    assert "cumsum" in found.text
    assert not any("rounded floats" in entry for entry in found.applied)


CODES, SCALE, BIAS = torch.randint(-127, 128, (6, 16), dtype=torch.int8), torch.rand(6) + 0.1, torch.randn(6)


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


def _signed(x: Tensor) -> Tensor:
    codes, scale = _codes(x)
    return torch._int_mm(codes, CODES.t()).float() * scale


def _shifted(x: Tensor) -> Tensor:
    """Unsigned codes, with the row sums of the weight taken off behind."""
    codes, scale = _codes(x)
    unsigned = (codes.to(torch.int32) + 128).to(torch.uint8)
    sums = CODES.to(torch.int32).sum(1)
    return (torch._int_mm(unsigned, CODES.t()) - 128 * sums).float() * scale


def _shifted_by_rows(x: Tensor) -> Tensor:
    """A zero point for each row, subtracted in floats."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    codes = (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)
    product = torch._int_mm(codes, CODES.t()).float()
    return (product - zero * CODES.float().sum(1)) * scale


def _as_bias(x: Tensor) -> Tensor:
    """A float linear on codes whose bias is the zero point times the row sums."""
    codes = (torch.round(x / 0.1) + 100).clamp(0, 255)
    return F.linear(codes, CODES.float(), -100.0 * CODES.float().sum(1))


@pytest.mark.parametrize("function", [_signed, _shifted, _shifted_by_rows, _as_bias])
@pytest.mark.parametrize("dynamic", [False, True])
def test_integer_products_are_linears_of_rounded_values(
    function: Any, dynamic: bool, canonical: Any, of: Any
) -> None:
    shapes = ({0: Dim("rows", min=18)},) if dynamic else None  # _int_mm on the CPU wants no fewer elsewhere
    found = canonical(of(function), 0.05 * torch.randn(20, 16), dynamic_shapes=(shapes,) if shapes else None)
    lines = found.text.splitlines()
    assert lines[-2].startswith(f"%{len(lines) - 2} = linear(")
    assert lines[-2].endswith("c[6,16])")  # no bias, and nothing behind
    assert "int" not in found.text.replace("inputs", "")
    if function is _shifted:
        assert "128)" not in found.text.replace("-128, 127", "")  # u + 128 - 128


def test_other_products_keep_their_order(canonical: Any, of: Any) -> None:
    def scaled(x: Tensor) -> Tensor:
        return F.linear(x, CODES.float()) * x.amax(-1, keepdim=True)

    def shifted(x: Tensor) -> Tensor:
        codes = torch.round(x).clamp(0, 255)
        return F.linear(codes, CODES.float()) - torch.arange(6.0)

    def biased(x: Tensor) -> Tensor:
        codes, scale = _codes(x)
        return F.linear(codes.float(), CODES.float(), BIAS) * scale

    for function in (scaled, shifted, biased):
        found = canonical(of(function), torch.randn(3, 16))
        assert "linear" not in found.text.splitlines()[-2]
