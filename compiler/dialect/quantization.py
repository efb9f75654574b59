"""Arithmetic of activation quantization shared by the operators that quantize (formulas: docs/dialect.md)."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255.0


def dynamic_params(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and zero point over `dims` (kept with size 1), for codes 0..255 and a range that contains 0."""
    low = x.amin(dims, keepdim=True).clamp(max=0)
    high = x.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, LEVELS)
    return scale, zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes 0..255 in the dtype of x: `clamp(round_half_even(x * (1 / scale)) + zero, 0, 255)`."""
    return (torch.round(x * (1.0 / scale)) + zero).clamp(0, LEVELS)


def params_for(x: Tensor, params: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and zero point that broadcast against x: the given static pair, or dynamic ones over `dims`."""
    if params is None:
        return dynamic_params(x, dims)
    pair = params.to(x.dtype)
    return pair[0], pair[1]
