"""GELU, SiLU and gated products."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

GELU = {
    "half first": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "half last": lambda x: x * (torch.erf(x * 0.7071067811865476) + 1.0) * 0.5,
    "halved": lambda x: x * (1 + torch.erf(x / 1.4142135623730951)) / 2,
    "operator": F.gelu,
}
TANH = {
    # transformers' NewGELU
    "power": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "products": lambda x: x * 0.5 * (torch.tanh((x * x * x * 0.044715 + x) * 0.7978845608028654) + 1),
    # transformers' FastGELU
    "factored": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "operator": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("spelling", GELU)
def test_gelu(spelling: str, canonical: Any, of: Any) -> None:
    text = canonical(of(GELU[spelling]), torch.randn(3, 8)).text
    assert text in ("%0 = gelu(inputs_0)\nreturn [%0]", "%0 = gelu(inputs_0, approximate=none)\nreturn [%0]")


@pytest.mark.parametrize("spelling", TANH)
def test_gelu_tanh(spelling: str, canonical: Any, of: Any) -> None:
    found = canonical(of(TANH[spelling]), torch.randn(3, 8))
    assert found.text == "%0 = gelu(inputs_0, approximate=tanh)\nreturn [%0]"


def test_silu(canonical: Any, of: Any) -> None:
    assert (
        canonical(of(lambda x: x * torch.sigmoid(x)), torch.randn(3, 8)).text
        == "%0 = silu(inputs_0)\nreturn [%0]"
    )


def test_quick_gelu_is_refused(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: x * torch.sigmoid(1.702 * x)), torch.randn(3, 8))
    assert found.refused == ["x sigmoid(1.702 x) is neither silu nor gelu (gelu is up to 0.02 away)"]
    assert "sigmoid" in found.text


@pytest.mark.parametrize(
    "near_miss",
    [
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3))),
        lambda x: 0.4 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: 0.5 * x * (2.0 + torch.erf(x / math.sqrt(2.0))),
        lambda x: 0.5 * x * (1.0 - torch.erf(x / math.sqrt(2.0))),
    ],
)
def test_other_constants_are_no_gelu(near_miss: Any, canonical: Any, of: Any) -> None:
    assert "gelu" not in canonical(of(near_miss), torch.randn(3, 8)).text


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.silu, "silu"),
        (F.relu, "relu"),
        (F.gelu, "gelu"),
        (TANH["power"], "gelu_tanh"),
        (lambda x: x * torch.sigmoid(x), "silu"),
    ],
)
@pytest.mark.parametrize("gate_first", [True, False])
def test_gated_product(function: Any, name: str, gate_first: bool, canonical: Any, of: Any) -> None:
    def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        gate, up = function(F.linear(x, w)), F.linear(x, v)
        return gate * up if gate_first else up * gate

    found = canonical(of(gated, w=torch.randn(6, 8), v=torch.randn(6, 8)), torch.randn(2, 3, 8))
    lines = sorted(line.split(" = ")[-1] for line in found.text.splitlines())
    assert sum(line.startswith("linear") for line in lines) == 2
    assert any(line.startswith("isofold.gated(") and line.endswith(f", {name})") for line in lines)
    assert len(lines) == 4


def test_gated_product_of_one_linear(canonical: Any, of: Any) -> None:
    def gated(x: Tensor, w: Tensor) -> Tensor:
        gate, up = F.linear(x, w).chunk(2, -1)
        return F.silu(gate) * up

    found = canonical(of(gated, w=torch.randn(12, 8)), torch.randn(2, 3, 8))
    assert found.text == (
        "%0 = linear(inputs_0, c[12,8])\n"
        "%1 = slice.Tensor(%0, 2, 0, 6, 1)\n"
        "%2 = slice.Tensor(%0, 2, 6, 12, 1)\n"
        "%3 = isofold.gated(%1, %2, silu)\n"
        "return [%3]"
    )


def test_gated_product_refusals(canonical: Any, of: Any) -> None:
    shared = canonical(of(lambda x, y: ((s := F.silu(x)) * y, s)), torch.randn(3, 8), torch.randn(3, 8))
    assert shared.refused == ["the result of silu has other readers than the product"]
    broadcast = canonical(of(lambda x, y: F.silu(x) * y), torch.randn(3, 1), torch.randn(3, 8))
    assert broadcast.refused == ["silu(gate) and the other factor have different shapes or types"]
    assert "gated" not in shared.text + broadcast.text


def test_a_constant_factor_is_no_gate(canonical: Any, of: Any) -> None:
    assert (
        "gated" not in canonical(of(lambda x, w: F.silu(x) * w, w=torch.randn(3, 8)), torch.randn(3, 8)).text
    )
