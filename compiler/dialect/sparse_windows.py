"""The layout `windows` of sparse int8 matrices: a byte for each value says where in 256 inputs it stands.

Panels of 16 rows, windows of 256 inputs (W of them), stored panel by panel, window by window, row by row. For the block
b = panel * W + window, with S_b values in all blocks before it:

    places   uint8 [...]   places[S_b + 16 b + r], r < 16: how many values row r has in the window (at most 255)
                           places[S_b + 16 (b + 1) + i]: place in the window of the block's i-th value, row by row
    values   int8  [V]     values[S_b + i]: the block's i-th value
    offsets  int32 [P + 1] values in front of each of the P panels

Sixteen bits a value and 0.03 a weight: fewer bytes than the bitmask below a density of 12 %. What decides is the work:
a row and a window are two loads, two byte permutations and a dot product, however few values there are, where a bitmask
needs four expansions.

Example (K = 300, one row, w[3] = 7, w[260] = -2, W = 2): places 1 0 ... 0, 3, then 1 0 ... 0, 4; values 7 -2 0 ...;
offsets 0 2.

Exact both ways. Places and values end with 64 zeros at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to
from .sparse_packing import PackedSparse, padded

WINDOW = 256
"""Inputs of a window."""

MOST = 255
"""Values that a row may have in a window."""


def pack_windows(matrix: Tensor) -> PackedSparse:
    """Encode int8 `[N, K]`. Raises InputError for floats and for a row with more than 255 values in a window."""
    if matrix.dtype != torch.int8:
        raise InputError(
            "The sparse layout 'windows' holds int8 codes", expected="torch.int8", got=str(matrix.dtype)
        )
    n, k = matrix.shape
    panels, windows = ceil_to(n, LANES) // LANES, ceil_to(k, WINDOW) // WINDOW
    whole = F.pad(matrix, (0, windows * WINDOW - k, 0, panels * LANES - n))
    blocks = whole.reshape(panels, LANES, windows, WINDOW).transpose(1, 2)
    there = blocks != 0
    counts = there.sum(-1)
    if counts.numel() and int(counts.amax()) > MOST:
        raise InputError(
            "A row of a sparse matrix has too many values in 256 inputs for the layout 'windows'",
            expected=f"at most {MOST}",
            got=str(int(counts.amax())),
            hint="the layout 'bitmask' holds any matrix",
        )
    index = torch.arange(WINDOW).expand(there.shape)[there].to(torch.uint8)
    stored = len(index)
    of_block = counts.reshape(-1, LANES).sum(1)
    starts = of_block.cumsum(0) - of_block
    heads = starts.unsqueeze(1) + LANES * torch.arange(len(starts)).unsqueeze(1) + torch.arange(LANES)
    places = torch.zeros(stored + LANES * len(starts), dtype=torch.uint8)
    is_head = torch.zeros(len(places), dtype=torch.bool)
    is_head[heads.flatten()] = True
    places[is_head] = counts.flatten().to(torch.uint8)
    places[~is_head] = index
    offsets = F.pad(counts.flatten(1).sum(1), (1, 0)).cumsum(0).to(torch.int32)
    return PackedSparse("windows", 8, padded(places), padded(blocks[there]), offsets, n, k, stored)


def unpack_windows(places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int) -> Tensor:
    """Decode to int8 `[n, k]`."""
    panels, windows = len(offsets) - 1, ceil_to(k, WINDOW) // WINDOW
    matrix = torch.zeros(panels, windows, LANES, WINDOW, dtype=values.dtype)
    at = 0
    for panel in range(panels):
        for window in range(windows):
            head = at + LANES * (panel * windows + window)
            counts = places[head : head + LANES].long()
            total = int(counts.sum())
            rows = torch.arange(LANES).repeat_interleave(counts)
            columns = places[head + LANES : head + LANES + total].long()
            matrix[panel, window, rows, columns] = values[at : at + total]
            at += total
    return matrix.transpose(1, 2).reshape(panels * LANES, -1)[:n, :k].contiguous()
