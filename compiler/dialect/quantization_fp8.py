"""Arithmetic of FP8 activations (E4M3) that the operators share: a scale, and codes of small floats.

    c = e4m3(x * (1 / s)),   x ~ s value[c]           value: `element_formats` ("e4m3")

`s` is the largest magnitude of a token over 448, the largest value of E4M3, so that nothing saturates; where that is
below 2^-126 (a row of zeros) it is 1. A static s is given, and larger values saturate. Rounding is to nearest, ties to
the even code; zero has one code, 0. NaN gets the code 0x7F. A token with infinities has an infinite scale, one with NaN
a scale of NaN: its results are not finite, those of other tokens are untouched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantization import LEAST_SCALE

LARGEST = 448.0
"""The largest value of E4M3."""
NAN_CODE = 0x7F


def scale_for(x: Tensor, params: Tensor | None) -> Tensor:
    """Scale that broadcasts against x: the given static one, or that of each token `[..., 1]`."""
    if params is not None:
        return params.to(x.dtype)
    scale = x.abs().amax(-1, keepdim=True) / LARGEST
    return torch.where(scale < LEAST_SCALE, torch.ones_like(scale), scale)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """Codes uint8 of x at this scale."""
    y = (x * (1.0 / scale)).to(torch.float32)
    codes = y.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(y == 0, torch.zeros_like(codes), codes)
    return torch.where(torch.isnan(y), torch.full_like(codes, NAN_CODE), codes)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of codes uint8, exact in float32 and float64."""
    return codes.contiguous().view(torch.float8_e4m3fn).to(dtype)
