"""The layout `windows` of sparse int8 matrices: a byte for each value says where in 256 inputs it stands.

Panels of 16 rows (P of them), windows of 256 inputs (W), in the order panel, window, row, input:

    places   uint8 [...]   places[16 (panel * W + window) + r]: how many values row r has in the window (at most 255)
                           places[16 P W + i]: where in its window the i-th value stands
    values   int8  [V]     the values
    offsets  int32 [P + 1] values in front of each of the P panels

Sixteen bits a value and 0.03 a weight: fewer bytes than the bitmask below a density of 12 %. What decides is the work:
a row and a window are two loads, two byte permutations and a dot product, however few values there are, where a bitmask
needs four expansions.

Example (K = 300, one row, w[3] = 7, w[260] = -2, so P = 1, W = 2): places 1 and 15 zeros, 1 and 15 zeros, 3 4 0 ...;
values 7 -2 0 ...; offsets 0 2.

Exact both ways. Behind the counts there are as many places as values, with the zeros of both.
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
    places = torch.cat([counts.flatten().to(torch.uint8), padded(index)])
    offsets = F.pad(counts.flatten(1).sum(1), (1, 0)).cumsum(0).to(torch.int32)
    return PackedSparse("windows", 8, places, padded(blocks[there]), offsets, n, k, len(index))


def unpack_windows(places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int) -> Tensor:
    """Decode to int8 `[n, k]`."""
    panels, windows = len(offsets) - 1, ceil_to(k, WINDOW) // WINDOW
    heads = panels * windows * LANES
    counts = places[:heads].long()
    row = torch.arange(heads).repeat_interleave(counts)
    matrix = torch.zeros(heads, WINDOW, dtype=values.dtype)
    matrix[row, places[heads : heads + len(row)].long()] = values[: len(row)]
    whole = matrix.reshape(panels, windows, LANES, WINDOW).transpose(1, 2)
    return whole.reshape(panels * LANES, -1)[:n, :k].contiguous()
