"""RMSNorm and LayerNorm: many spellings, one text; near misses refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

GAIN = torch.linspace(0.5, 1.5, 8)
BIAS = torch.linspace(-1, 1, 8)

# As Hugging Face's Llama (casts), T5, and hand-written code spell it.
RMS = {
    "rsqrt": lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g,
    "gain first": lambda x, g: g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "casts": lambda x, g: g * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6)).to(x.dtype),
    "product": lambda x, g: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * g,
    "quotient": lambda x, g: x / torch.sqrt(1e-6 + x.square().mean(-1, keepdim=True)) * g,
    "power": lambda x, g: x * (x.pow(2).mean(2, keepdim=True) + 1e-6).pow(-0.5) * g,
    "reciprocal": lambda x, g: x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * g,
    "root on the left": lambda x, g: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x * g,
    "one plus gain": lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + g),
    "operator": lambda x, g: torch.rms_norm(x, [8], g, 1e-6),
}
RMS_TEXT = "%0 = rms_norm(x, [8], c[8], 1e-06)\nreturn [%0]"


def _renamed(text: str) -> str:
    return text.replace("inputs_0", "x").replace("inputs_1", "y")


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm_has_one_spelling(spelling: str, canonical: Any, of: Any) -> None:
    found = canonical(of(RMS[spelling], gain=GAIN), torch.randn(2, 3, 8))
    assert _renamed(found.text) == RMS_TEXT


def test_rms_norm_without_gain_keeps_a_computed_one_outside(canonical: Any, of: Any) -> None:
    def adaptive(x: Tensor, y: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * y

    found = canonical(of(adaptive), torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert _renamed(found.text) == "%0 = rms_norm(x, [8], None, 1e-06)\n%1 = mul.Tensor(%0, y)\nreturn [%1]"


def test_rms_norm_in_half_precision_needs_no_casts(canonical: Any, of: Any) -> None:
    found = canonical(of(RMS["casts"], gain=GAIN.half()), torch.randn(2, 3, 8).half())
    assert _renamed(found.text) == RMS_TEXT


def test_a_root_of_narrower_numbers_is_no_rms_norm(canonical: Any, of: Any) -> None:
    def narrow(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.half().pow(2).mean(-1, keepdim=True) + 1e-6)

    assert "rms_norm" not in canonical(of(narrow), torch.randn(2, 3, 8), tolerance=1e-2).text


RMS_REFUSED = {
    "dimension 1": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
        "it normalizes dimensions [1] of 3, not the last one",
    ),
    "two dimensions": (
        lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
        "it normalizes dimensions [1, 2] of 3, not the last one",
    ),
    "negative epsilon": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 1e-6),
        "its epsilon -1e-06 is negative",
    ),
    "another value": (
        lambda x: torch.tanh(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        "the root of the mean square does not just divide the value that it was computed from",
    ),
    "root read twice": (
        lambda x: (x * (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), r),
        "the root of the mean square does not just divide the value that it was computed from",
    ),
}


@pytest.mark.parametrize("case", RMS_REFUSED)
def test_rms_norm_refuses(case: str, canonical: Any, of: Any) -> None:
    function, reason = RMS_REFUSED[case]
    found = canonical(of(function), torch.randn(2, 3, 8))
    assert reason in found.refused
    assert "rms_norm" not in found.text


def test_epsilon_outside_the_root_is_no_rms_norm(canonical: Any, of: Any) -> None:
    found = canonical(of(lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2)), torch.randn(2, 3, 8))
    assert "rms_norm" not in found.text


LAYER = {
    "centred squares": lambda x, g, b: (
        (c := x - x.mean(-1, keepdim=True)) * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * g + b
    ),
    "quotient": lambda x, g, b: (
        g * ((c := x - x.mean(-1, keepdim=True)) / torch.sqrt((c * c).mean(-1, keepdim=True) + 1e-5)) + b
    ),
    "variance": lambda x, g, b: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * g + b
    ),
    "variance, rsqrt": lambda x, g, b: (
        b + (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5) * g
    ),
    "operator": lambda x, g, b: torch.layer_norm(x, [8], g, b, 1e-5, False),
}


@pytest.mark.parametrize("spelling", LAYER)
def test_layer_norm_has_one_spelling(spelling: str, canonical: Any, of: Any) -> None:
    found = canonical(of(LAYER[spelling], gain=GAIN, bias=BIAS), torch.randn(2, 3, 8))
    assert _renamed(found.text) == "%0 = layer_norm(x, [8], c[8], c[8], 1e-05, False)\nreturn [%0]"


def test_layer_norm_refuses_the_sample_variance(canonical: Any, of: Any) -> None:
    def sample(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)

    found = canonical(of(sample), torch.randn(2, 3, 8))
    assert found.refused == ["its variance divides by one less than the size, LayerNorm's by the size"]
    assert "layer_norm" not in found.text


def test_layer_norm_of_another_mean_is_left_alone(canonical: Any, of: Any) -> None:
    def channels_first(x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(1, keepdim=True) + 1e-5)

    found = canonical(of(channels_first), torch.randn(2, 3, 8))
    assert "it normalizes dimensions [1] of 3, not the last one" in found.refused
    assert "norm" not in found.text
