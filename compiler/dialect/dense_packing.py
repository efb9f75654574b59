"""The layout of dense float32 weights: panels of 32 rows, K outermost in each.

    P[b, k, j] = W[32 b + j, k]         zero where there is no such row

A step of K is 128 consecutive bytes for any K (`runtimes/kernels/dense.py`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

PANEL = 32
"""Rows of a panel."""


def pack_dense(weight: Tensor) -> Tensor:
    """`[rows, K]` → `[ceil(rows / 32), K, 32]`, contiguous."""
    rows, k = weight.shape
    padded = F.pad(weight, (0, 0, 0, -rows % PANEL))
    return padded.reshape(-1, PANEL, k).transpose(1, 2).contiguous()


def unpack_dense(packed: Tensor, rows: int) -> Tensor:
    """The first `rows` rows `[rows, K]` of packed panels."""
    blocks, k, panel = packed.shape
    return packed.transpose(1, 2).reshape(blocks * panel, k)[:rows]
