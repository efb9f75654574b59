"""Hadamard transforms of rows: `y = x H` over the last dimension, H orthogonal with entries of one magnitude.

A transform is named by its orders, `H = H_1 (x) H_2 (x) ... (x) H_r / sqrt(product)` (Kronecker), repeated along the
diagonal where the product is smaller than the dimension. `factor(n)` chooses orders for a size. Index i of a block is
(i_1, ..., i_r) with i_r fastest, so each factor is one small matrix product along one axis: n (sum of orders) additions
for cores, n log n for a power of two, instead of n^2.

Rows are multiplied from the right: `y[j] = sum_i x[i] H[i, j]`. Most orders are symmetric (see `hadamard_orders`),
all are orthogonal: x = y H^T, `transpose=True`. With weights, (x H)(W H)^T = x W^T whatever H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hadamard_orders import check_orders, factor, is_power_of_two, signs

RADIX = 16
"""Powers of two are applied in steps of at most this order: as small matrix products."""


def steps(orders: Sequence[int]) -> list[int]:
    """`orders` with the power of two split into steps of at most `RADIX` (H_64 = H_16 (x) H_4)."""
    result: list[int] = []
    for order in orders:
        while is_power_of_two(order) and order > RADIX:
            result.append(RADIX)
            order //= RADIX
        if order > 1:
            result.append(order)
    return result


def apply_hadamard(x: Tensor, orders: Sequence[int], transpose: bool = False) -> Tensor:
    """x H, or x H^T, over the last dimension of x float `[..., n]`; differentiable. x itself without orders.

    Raises InputError where the orders are unknown or do not fit n.
    """
    orders = check_orders(orders, int(x.shape[-1]))
    if not orders:
        return x
    inner = 1
    for order in orders:
        inner *= order
    scale = inner**-0.5
    y = x
    for order in steps(orders):
        inner //= order
        matrix = torch.tensor(signs(order), dtype=x.dtype, device=x.device)
        matrix = matrix.T if transpose else matrix
        y = y.reshape(-1, order) @ matrix if inner == 1 else matrix.T @ y.reshape(-1, order, inner)
    return y.reshape(x.shape) * scale


def hadamard_matrix(
    n: int, dtype: torch.dtype = torch.float64, orders: Sequence[int] | None = None
) -> Tensor:
    """The orthogonal matrix H `[n, n]` of `orders` (default: `factor(n)`), all zeros outside its diagonal blocks."""
    chosen = factor(n) if orders is None else orders
    return apply_hadamard(torch.eye(n, dtype=torch.float64), chosen).to(dtype)


def randomised_hadamard(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """diag(s) H `[n, n]` with independent random signs s from `seed`: orthogonal, and another matrix for each seed."""
    generator = torch.Generator().manual_seed(seed)
    flips = torch.randint(0, 2, (n, 1), generator=generator).to(torch.float64) * 2 - 1
    return (flips * hadamard_matrix(n)).to(dtype)
