"""`isofold::quantize_activation_fp8`: activations to FP8 codes (E4M3), a byte each, and their scales.

    x' = ((x - shift) * scale) H,   c = e4m3(x' / s)

The same codes as `quantize_dequantize_fp8` of x' (BITWISE), for the `linear_fp8` that read them. The scale of a dynamic
token is that of x'. The last dimension is padded to a multiple of `align` with code 0, which is the value 0.

Example (one row, align 4): x = [-448, 1, 0.5] has s = 1 and the codes 0xFE 0x38 0x30 0x00.
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
from .quantization import affine
from .quantization_fp8 import encode, scale_for


def _shape(
    x: Tensor,
    params: Tensor | None,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    hadamard: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    check_orders(hadamard, int(x.shape[-1]))
    codes = x.new_empty([*x.shape[:-1], ceil_to(x.shape[-1], align)], dtype=torch.uint8)
    return codes, x.new_empty([1] if params is not None else [*x.shape[:-1], 1])


def _cost(
    x: Tensor,
    params: Tensor | None,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    hadamard: Sequence[int] = (),
) -> Cost:
    operations = 4 + (shift is not None) + (scale is not None) + sum(steps(hadamard)) + bool(hadamard)
    return Cost(tensor_bytes(shift, scale), tensor_bytes(x) + int(x.numel()), operations * int(x.numel()))


@operator(
    onnx_name="QuantizeActivationFp8",
    schema=(
        "(Tensor x, Tensor? params, int align, Tensor? shift=None, Tensor? scale=None, int[] hadamard=[]) "
        "-> (Tensor, Tensor)"
    ),
    shape=_shape,
    cost=_cost,
)
def quantize_activation_fp8(
    x: Tensor,
    params: Tensor | None,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    hadamard: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """x `[..., K]`, shift and scale `[K]` → u uint8 `[..., ceil(K, align)]`, params: s `[..., 1]` (dynamic) or `[1]`.

    hadamard: orders of the transform H, as in `isofold.hadamard`; empty: none.
    """
    x = apply_hadamard(affine(x, shift, scale), hadamard)
    step = scale_for(x, params)
    padded = F.pad(encode(x, step), (0, ceil_to(x.shape[-1], align) - x.shape[-1]))
    return padded, step if params is None else params.to(x.dtype, copy=True)
