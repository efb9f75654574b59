"""The layouts `1x4`, `16x1` and `16x4` of block sparse matrices: blocks are rows x inputs, and stored whole.

`1x4`, int8 only: a bitmask (`sparse_packing`) over groups of 4 inputs: bit g of a row's bits is 1 where w[n, 4 g .. 4
g + 3] is not zero, values `[V]` holds four codes for each one, offsets count groups. Blocks of 1x16, 4x4 and other
multiples are blocks of 1x4 too. A quarter of a bit a weight for the places.

`16x1` (float32, bfloat16) and `16x4` (int8), panels of 16 rows: the columns of a panel that are not zero, one after
the other

    places   uint16 [B + 8]            number of the block's column: k for 16x1, k // 4 for 16x4
    values   [(B + 8), 16, 1 or 4]     values[b, r, j] = w[16 p + r, k + j]
    offsets  int32 [P + 1]             blocks in front of each of the P panels

which is the dense layout (`packing`) with columns left out: taller and wider blocks are several of these. K is at most
65,536 (16x4: four times that). 8 zero blocks end the lists, so that kernels may load ahead.

Example (16x1, one row, K = 5, w = 0 7 0 0 -2): places 1 4 0 ...; values 7 and 15 zeros, -2 and 15 zeros, ...; offsets
0 2.

Exact both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to
from .sparse_packing import PackedSparse, pack_bits, padded, row_offsets, unpack_bits

BLOCKS = {"1x4": (1, 4), "16x1": (16, 1), "16x4": (16, 4)}
"""Rows and inputs of a block."""

AHEAD = 8
"""Zero blocks behind the last one."""


def pack_blocks(matrix: Tensor, layout: str) -> PackedSparse:
    """Encode a matrix `[N, K]`. Raises InputError for a type or a K that the layout does not hold."""
    height, width = BLOCKS[layout]
    if matrix.is_floating_point() != (layout == "16x1"):
        raise InputError(
            f"The sparse layout '{layout}' does not hold this type",
            expected="floats" if layout == "16x1" else "int8 codes",
            got=str(matrix.dtype),
        )
    n, k = matrix.shape
    if height == LANES and ceil_to(k, width) // width > 1 << 16:
        raise InputError(
            f"The sparse layout '{layout}' holds at most 65,536 columns of blocks", got=f"K = {k}"
        )
    whole = F.pad(matrix, (0, -k % width, 0, -n % LANES))
    if height == 1:
        groups = whole.unflatten(1, (-1, width))
        there = (groups != 0).any(-1)
        values, counts = groups[there].flatten(), there.sum(1)[:n]
        return PackedSparse(
            layout, 8, pack_bits(there), padded(values), row_offsets(counts, n), n, k, len(values)
        )
    blocks = whole.unflatten(0, (-1, LANES)).unflatten(2, (-1, width)).transpose(1, 2)
    there = (blocks != 0).flatten(2).any(-1)
    columns = torch.arange(there.shape[1]).expand(there.shape)[there]
    values = F.pad(blocks[there], (0, 0, 0, 0, 0, AHEAD)).contiguous()
    # torch has no arithmetic on uint16, and little else.
    places = F.pad(columns, (0, AHEAD)).to(torch.int32).to(torch.uint16)
    offsets = F.pad(there.sum(1), (1, 0)).cumsum(0).to(torch.int32)
    return PackedSparse(layout, 8, places, values, offsets, n, k, len(columns) * LANES * width)


def unpack_blocks(layout: str, places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int) -> Tensor:
    """Decode to `[n, k]` in the type of `values`."""
    height, width = BLOCKS[layout]
    if height == 1:
        there = unpack_bits(places)
        matrix = torch.zeros(*there.shape, width, dtype=values.dtype)
        matrix[there] = values[: width * int(there.sum())].unflatten(0, (-1, width))
        return matrix.flatten(1)[:n, :k].contiguous()
    counts = offsets.diff().long()
    total = int(offsets[-1])
    panels = torch.arange(len(counts)).repeat_interleave(counts)
    matrix = torch.zeros(len(counts), ceil_to(k, width) // width, LANES, width, dtype=values.dtype)
    matrix[panels, places.to(torch.int32)[:total].long()] = values[:total]
    return matrix.transpose(1, 2).reshape(len(counts) * LANES, -1)[:n, :k].contiguous()
