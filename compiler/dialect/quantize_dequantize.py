"""`isofold::quantize_dequantize`: round activations to 8 or 4 bits and back (simulated quantization).

    y = s (u - z),  u = clamp(round(x / s) + z, 0, 2^bits - 1)

It marks where an activation is quantized before weights are packed; the packed form
(`quantize_activation` and a packed linear) computes with the same u, s and z. The gradient is
straight-through inside the range and 0 where x is clamped. Error at most s/2 inside the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .operator import Cost, operator, tensor_bytes
from .quantization import levels, params_for, quantize


def granularity_dims(x: Tensor, granularity: str) -> tuple[int, ...]:
    """Dimensions over which one pair (scale, zero point) is shared."""
    if granularity == "token":
        return (x.dim() - 1,)
    if granularity == "sample":
        return tuple(range(1, x.dim()))
    raise InputError("Unknown granularity of quantization", expected="token | sample", got=repr(granularity))


def _straight_through(x: Tensor, params: Tensor | None, granularity: str, bits: int = 8) -> Tensor:
    scale, zero = params_for(x, params, granularity_dims(x, granularity), bits)
    scale, zero = scale.detach(), zero.detach()
    clamped = torch.minimum(torch.maximum(x, -zero * scale), (levels(bits) - zero) * scale)
    rounded = scale * (quantize(x, scale, zero, bits) - zero)
    return clamped + (rounded - clamped).detach()


@operator(
    onnx_name="QuantizeDequantize",
    schema="(Tensor x, Tensor? params, str granularity, int bits=8) -> Tensor",
    shape=lambda x, params, granularity, bits=8: torch.empty_like(x),
    cost=lambda x, params, granularity, bits=8: Cost(0, 2 * tensor_bytes(x), 4 * int(x.numel())),
    surrogate=_straight_through,
)
def quantize_dequantize(x: Tensor, params: Tensor | None, granularity: str, bits: int = 8) -> Tensor:
    """x float → float of the same shape; params `[2]` (static) or None (dynamic, per token or per sample)."""
    scale, zero = params_for(x, params, granularity_dims(x, granularity), bits)
    return scale * (quantize(x, scale, zero, bits) - zero)
