"""`isofold::quantize_activation`: activations to unsigned codes of 8 or 4 bits and their (scale, zero point) pairs.

    x' = ((x - shift) * scale) H,   u = codes of x'

The same codes as `quantize_dequantize` of x' (BITWISE), kept as integers for the packed linears that read them: one
byte for each, whatever their width. The range of a dynamic pair is that of x'. The last dimension is padded to a
multiple of `align` with code 0, which meets zero weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hadamard import apply_hadamard, steps
from ..hadamard_orders import check_orders
from .operator import Cost, operator, tensor_bytes
from .packing import ceil_to
from .quantization import affine, params_for, quantize


def _shape(
    x: Tensor,
    params: Tensor | None,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    bits: int = 8,
    hadamard: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    check_orders(hadamard, int(x.shape[-1]))
    codes = x.new_empty([*x.shape[:-1], ceil_to(x.shape[-1], align)], dtype=torch.uint8)
    return codes, x.new_empty([2] if params is not None else [*x.shape[:-1], 2])


def _cost(
    x: Tensor,
    params: Tensor | None,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    bits: int = 8,
    hadamard: Sequence[int] = (),
) -> Cost:
    operations = 4 + (shift is not None) + (scale is not None) + sum(steps(hadamard)) + bool(hadamard)
    return Cost(tensor_bytes(shift, scale), tensor_bytes(x) + int(x.numel()), operations * int(x.numel()))


@operator(
    onnx_name="QuantizeActivation",
    schema=(
        "(Tensor x, Tensor? params, int align, Tensor? shift=None, Tensor? scale=None, int bits=8, "
        "int[] hadamard=[]) -> (Tensor, Tensor)"
    ),
    shape=_shape,
    cost=_cost,
)
def quantize_activation(
    x: Tensor,
    params: Tensor | None,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    bits: int = 8,
    hadamard: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """x `[..., K]`, shift and scale `[K]` → u uint8 `[..., ceil(K, align)]`, params `[..., 2]` (dynamic) or `[2]`.

    hadamard: orders of the transform H, as in `isofold.hadamard`; empty: none.
    """
    x = apply_hadamard(affine(x, shift, scale), hadamard)
    step, zero = params_for(x, params, (x.dim() - 1,), bits)
    codes = quantize(x, step, zero, bits).to(torch.uint8)
    padded = F.pad(codes, (0, ceil_to(x.shape[-1], align) - x.shape[-1]))
    pair = torch.cat([step, zero], -1) if params is None else params.to(x.dtype, copy=True)
    return padded, pair
