"""Arithmetic of activation quantization shared by the operators that quantize (formulas: docs/dialect.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

LEAST_SCALE = 2.0**-126
"""The smallest dynamic scale: the least normal float32. The reciprocal of less can be infinite, and codes would be NaN;
a row of such small values is quantized as zeros are, with scale 1."""


def levels(bits: int) -> float:
    """The largest code, 2^bits - 1. Raises InputError for widths other than 4 and 8."""
    if bits not in (4, 8):
        raise InputError("Activations have no codes of this width", expected="bits 4 | 8", got=str(bits))
    return float(2**bits - 1)


def dynamic_params(x: Tensor, dims: tuple[int, ...], bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and zero point over `dims` (kept with size 1), for codes 0..levels(bits) and a range that contains 0."""
    largest = levels(bits)
    low = x.amin(dims, keepdim=True).clamp(max=0)
    high = x.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / largest
    scale = torch.where(scale >= LEAST_SCALE, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, largest)
    return scale, zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int = 8) -> Tensor:
    """Codes in the dtype of x: `clamp(round_half_even(x * (1 / scale)) + zero, 0, levels(bits))`."""
    return (torch.round(x * (1.0 / scale)) + zero).clamp(0, levels(bits))


def affine(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """`(x - shift) * scale` with vectors over the last dimension, either of which may be absent."""
    x = x if shift is None else x - shift
    return x if scale is None else x * scale


def params_for(
    x: Tensor, params: Tensor | None, dims: tuple[int, ...], bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that broadcast against x: the given static pair, or dynamic ones over `dims`."""
    if params is None:
        return dynamic_params(x, dims, bits)
    pair = params.to(x.dtype)
    return pair[0], pair[1]
