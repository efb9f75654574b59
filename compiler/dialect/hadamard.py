"""`isofold::hadamard`: multiplication of rows with an orthogonal Hadamard matrix, n log n (see `compiler.hadamard`).

    y = x H,   H = diag(B, ..., B),   B = H_1 (x) ... (x) H_r / sqrt(product of the orders)

It spreads an outlier channel over the whole row before a quantizer. The inverse, folded into the weights that read
y, leaves the program equal over the reals (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hadamard import apply_hadamard, steps
from ..hadamard_orders import check_orders
from .operator import Cost, operator, tensor_bytes


def _shape(x: Tensor, orders: list[int], transpose: bool) -> Tensor:
    check_orders(orders, int(x.shape[-1]))
    return x.new_empty(x.shape)


@operator(
    onnx_name="Hadamard",
    schema="(Tensor x, int[] orders, bool transpose) -> Tensor",
    shape=_shape,
    cost=lambda x, orders, transpose: Cost(0, 2 * tensor_bytes(x), int(x.numel()) * (1 + sum(steps(orders)))),
)
def hadamard(x: Tensor, orders: list[int], transpose: bool) -> Tensor:
    """x float `[..., n]` → x H (x H^T where `transpose`) of the same shape; the product of the orders divides n.

    Raises InputError where it does not, or an order is unknown.
    """
    y = apply_hadamard(x, orders, transpose)
    return x.clone(memory_format=torch.contiguous_format) if y is x else y.contiguous()
