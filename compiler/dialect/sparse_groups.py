"""The layouts `1:4`, `2:4` and `4:8` of sparse int8 matrices: N values and N indices for every M inputs.

Rows are cut into blocks of 64 values, which are 256 (1:4) or 128 inputs; B blocks a row, `Np = ceil(N, 16)`:

    values   int8  [Np, B, 64]       values[n, b, j]: a value of group g = j // N of the block's groups of M inputs
    places   uint8 [Np, B, 8 w]      w bits for each value (2, for M = 8: 3), its index in the group: index of value j
                                     of a block is bits w (j % 8) .. of the w bytes from w (j // 8) on
    offsets  int32 [1]               0: nothing is counted

The values of a group stand in the order of their indices, which differ; a group with fewer than N non-zeros stores
zeros too. Bits a weight: 1:4 2.5, 2:4 5, 4:8 5.5 (bitmask at these densities: 3, 5, 5). What indices save is work:
they are turned into an operand that picks the activations (one byte permutation for 64 values), where bits must be
expanded.

Example (2:4, one row, K = 8, w = 0 7 0 -2, 0 0 0 5): values 7 -2 0 5 0 ...; indices 1 3, 0 3, then 0 1 0 1 ...:
places 0b11_00_11_01 = 0xCD, then 0x01_00_01_00 = 0x44 twice and more.

Exact both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to
from .sparse_packing import PackedSparse

GROUPS = {"1:4": (1, 4, 2), "2:4": (2, 4, 2), "4:8": (4, 8, 3)}
"""Values of a group, inputs of a group, bits of an index."""

BLOCK = 64
"""Values of a block."""


def block_inputs(layout: str) -> int:
    """Inputs of a block."""
    some, of, _ = GROUPS[layout]
    return BLOCK // some * of


def pack_groups_of(matrix: Tensor, layout: str) -> PackedSparse:
    """Encode int8 `[N, K]`. Raises InputError for floats and for a group with too many non-zeros."""
    some, of, width = GROUPS[layout]
    if matrix.dtype != torch.int8:
        raise InputError(
            f"The sparse layout '{layout}' holds int8 codes", expected="torch.int8", got=str(matrix.dtype)
        )
    n, k = matrix.shape
    rows, columns = ceil_to(n, LANES), ceil_to(k, block_inputs(layout))
    groups = F.pad(matrix, (0, columns - k, 0, rows - n)).reshape(rows, -1, of)
    there = groups != 0
    most = int(there.sum(-1).amax()) if there.numel() else 0
    if most > some:
        raise InputError(
            f"A matrix does not have the pattern {layout}",
            expected=f"at most {some} non-zeros in every {of} inputs",
            got=str(most),
        )
    # Non-zeros first, each part in the order of its inputs; then the chosen ones in the order of their inputs.
    order = (~there).to(torch.int8).argsort(dim=-1, stable=True)[..., :some].sort(-1).values
    values = groups.gather(-1, order).reshape(rows, -1, BLOCK)
    words = (order.reshape(rows, -1, 8) << (width * torch.arange(8))).sum(-1)
    places = torch.stack([(words >> (8 * i)) & 255 for i in range(width)], -1).to(torch.uint8)
    stored = values[:n].numel()
    return PackedSparse(
        layout,
        8,
        places.reshape(rows, -1, 8 * width).contiguous(),
        values.contiguous(),
        torch.zeros(1, dtype=torch.int32),
        n,
        k,
        min(stored, n * ceil_to(k, of) // of * some),
    )


def unpack_groups_of(layout: str, places: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    """Decode to int8 `[n, k]`."""
    some, of, width = GROUPS[layout]
    rows = values.shape[0]
    parts = places.reshape(rows, -1, width).long()
    words = sum(parts[..., i] << (8 * i) for i in range(width))
    assert isinstance(words, Tensor)
    index = (words.unsqueeze(-1) >> (width * torch.arange(8))) & ((1 << width) - 1)
    matrix = torch.zeros(rows, values[0].numel() // some, of, dtype=values.dtype)
    matrix.scatter_(-1, index.reshape(rows, -1, some), values.reshape(rows, -1, some))
    return matrix.flatten(1)[:n, :k].contiguous()
