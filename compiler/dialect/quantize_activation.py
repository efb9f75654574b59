"""`isofold::quantize_activation`: activations to unsigned 8-bit codes and their (scale, zero point) pairs.

The same codes as `quantize_dequantize` (BITWISE), kept as integers for the packed linears that read them.
The last dimension is padded to a multiple of `align` with code 0, which meets zero weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .operator import Cost, operator, tensor_bytes
from .packing import ceil_to
from .quantization import params_for, quantize


def _shape(x: Tensor, params: Tensor | None, align: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty([*x.shape[:-1], ceil_to(x.shape[-1], align)], dtype=torch.uint8)
    return codes, x.new_empty([2] if params is not None else [*x.shape[:-1], 2])


@operator(
    onnx_name="QuantizeActivation",
    schema="(Tensor x, Tensor? params, int align) -> (Tensor, Tensor)",
    shape=_shape,
    cost=lambda x, params, align: Cost(0, tensor_bytes(x) + int(x.numel()), 4 * int(x.numel())),
)
def quantize_activation(x: Tensor, params: Tensor | None, align: int) -> tuple[Tensor, Tensor]:
    """x `[..., K]` → u uint8 `[..., ceil(K, align)]`, params `[..., 2]` (dynamic) or `[2]` (static)."""
    scale, zero = params_for(x, params, (x.dim() - 1,))
    codes = quantize(x, scale, zero).to(torch.uint8)
    padded = F.pad(codes, (0, ceil_to(x.shape[-1], align) - x.shape[-1]))
    pair = torch.cat([scale, zero], -1) if params is None else params.to(x.dtype, copy=True)
    return padded, pair
