"""`isofold::norm`: residual add and LayerNorm or RMSNorm over the last dimension in one pass.

    sum = x + residual
    layer: y = (sum - mean) / sqrt(var + eps) * weight + bias      (var: biased)
    rms:   y = sum / sqrt(mean(sum^2) + eps) * weight + bias

Equal over the reals to the operators it replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .operator import Cost, operator, tensor_bytes


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """LayerNorm or RMSNorm of x over its last dimension."""
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
    elif kind == "rms":
        centred = x
    else:
        raise InputError("Unknown kind of norm", expected="layer | rms", got=repr(kind))
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def norm_cost(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: object
) -> Cost:
    """Reads x and the residual once, writes the sum and the result."""
    return Cost(tensor_bytes(weight, bias), tensor_bytes(x, residual, x, x), 8 * int(x.numel()))


@operator(
    onnx_name="Norm",
    schema="(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str kind) -> (Tensor, Tensor)",
    shape=lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)),
    cost=norm_cost,
)
def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """x `[..., K]` → (sum, y), both `[..., K]`."""
    total = x.clone() if residual is None else x + residual
    return total, normalize(total, weight, bias, eps, kind)
