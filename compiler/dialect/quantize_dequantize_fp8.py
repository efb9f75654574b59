"""`isofold::quantize_dequantize_fp8`: round activations to FP8 (E4M3) and back (simulated quantization).

    y = s value[c],   c = e4m3(x / s)

It marks where an activation becomes FP8 before weights are packed; the packed form (`quantize_activation_fp8` and
`linear_fp8`) computes with the same c and s (`quantization_fp8.py`). The gradient is straight-through inside the range
and 0 where x saturates. The error of a value is at most 2^-4 of it, or s 2^-10 below s 2^-6.

Example: a row with the largest magnitude 448 has s = 1; 17 becomes 16 (tie, even), 18.5 becomes 18, 0.001 becomes
2^-9, the least value, 0.0009 becomes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Cost, operator, tensor_bytes
from .quantization_fp8 import LARGEST, decode, encode, scale_for


def _straight_through(x: Tensor, params: Tensor | None) -> Tensor:
    held = x.detach()
    scale = scale_for(held, params)
    inside = (
        held.abs() * (1.0 / scale) <= LARGEST
        if params is not None
        else torch.ones_like(held, dtype=torch.bool)
    )
    rounded = scale * decode(encode(held, scale), x.dtype)
    return rounded + torch.where(inside, x - held, torch.zeros_like(held))


@operator(
    onnx_name="QuantizeDequantizeFp8",
    schema="(Tensor x, Tensor? params) -> Tensor",
    shape=lambda x, params: torch.empty_like(x),
    cost=lambda x, params: Cost(0, 2 * tensor_bytes(x), 4 * int(x.numel())),
    surrogate=_straight_through,
)
def quantize_dequantize_fp8(x: Tensor, params: Tensor | None) -> Tensor:
    """x float → float of the same shape; params: the scale `[1]` (static) or None (dynamic, per token)."""
    scale = scale_for(x, params)
    return scale * decode(encode(x, scale), x.dtype)
