"""`isofold::rotary`: rotary position embedding of the leading heads and dimensions.

Each pair (a, b) of dimensions turns by its angle: `a' = a cos - b sin`, `b' = b cos + a sin` with the
tables' own columns for a and b. Half-split pairs are (i, i + R/2), interleaved ones (2i, 2i + 1).
Equal over the reals to the slices, negations, concatenations and products it replaces
(RoFormer, arXiv 2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Cost, operator, tensor_bytes


def _cost(x: Tensor, cos: Tensor, sin: Tensor, *rest: object) -> Cost:
    return Cost(0, 2 * tensor_bytes(x) + tensor_bytes(cos, sin), 3 * int(x.numel()))


@operator(
    onnx_name="Rotary",
    schema="(Tensor x, Tensor cos, Tensor sin, int head_dim_index, int heads, bool interleaved) -> Tensor",
    shape=lambda x, *rest: x.new_empty(x.shape),
    cost=_cost,
)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, head_dim_index: int, heads: int, interleaved: bool) -> Tensor:
    """x `[B, S, H, D]` (head_dim_index 2) or `[B, H, S, D]` (1), cos and sin `[B|1, S, 1, R]` or `[B|1, 1, S, R]`."""
    count = x.shape[head_dim_index] if heads < 0 else heads
    turned, rest = x.split([count, x.shape[head_dim_index] - count], head_dim_index)
    width = cos.shape[-1]
    part, tail = turned[..., :width], turned[..., width:]
    if interleaved:
        half = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
    else:
        first, second = part.chunk(2, -1)
        half = torch.cat([-second, first], -1)
    rotated = torch.cat([part * cos + half * sin, tail], -1)
    return torch.cat([rotated, rest], head_dim_index).contiguous()
