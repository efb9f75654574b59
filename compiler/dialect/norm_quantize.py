"""`isofold::norm_quantize`: `norm`, then `quantize_activation` of its result, in one pass over the rows.

The composition itself (BITWISE equal to the two operators in the reference; kernels may round sums in
another order).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .norm import norm, norm_cost
from .operator import operator
from .packing import ceil_to
from .quantize_activation import quantize_activation


def _shape(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    params: Tensor | None,
    eps: float,
    kind: str,
    align: int,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = x.new_empty([*x.shape[:-1], ceil_to(x.shape[-1], align)], dtype=torch.uint8)
    pair = x.new_empty([2] if params is not None else [*x.shape[:-1], 2])
    return torch.empty_like(x), torch.empty_like(x), codes, pair


@operator(
    onnx_name="NormQuantize",
    schema=(
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? params, float eps, str kind, "
        "int align, Tensor? shift=None, Tensor? scale=None, int bits=8, int[] hadamard=[]) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    shape=_shape,
    cost=norm_cost,
)
def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    params: Tensor | None,
    eps: float,
    kind: str,
    align: int,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    bits: int = 8,
    hadamard: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `[..., K]`; shift, scale, bits and hadamard as in `quantize_activation` → (sum, y, u uint8
    `[..., ceil(K, align)]`, params `[..., 2]` or `[2]`).
    """
    total, y = norm.reference(x, residual, weight, bias, eps, kind)
    return (total, y, *quantize_activation.reference(y, params, align, shift, scale, bits, hadamard))
