"""The layout `panels` of sparse int4 matrices: a bitmask in the order in which dense kernels read.

16 rows are a panel; a *word* is 64 bits of it, 16 rows by 4 inputs. P = ceil(N / 16), `C = 32 ceil(K / 128)` words:

    places   uint8  [P, 8 C]     bit 4 r + j of word c of panel p is 1 where w[16 p + r, 4 c + j] != 0
    values   uint8  [V]          two codes to a byte, the low nibble first, two's complement: those of a word in the order
                                 of its bits, every word at a new byte
    offsets  int32  [P + 1]      bytes of values in front of each panel

V is offsets[P] + 64, rounded up to a multiple of 64. As many bits a weight as the bitmask by rows: 1 + 4 * density, and
a quarter of a byte a word. Why by panels: sums of 16 rows lie in the lanes of one register, so that a scale for each
32 inputs is one multiply-add for 512 weights (by rows: for 64), masks and values are read from front to back, and an
expanded word is a word of the panel that dense int8 kernels take.

Example (K = 5, one row, w = 0 7 0 0 -2): word 0 of panel 0 has bit 1, word 1 bit 0: bytes 0 and 8 of places are 2 and 1,
the rest 0; values 0x07 0x0E 0 ...; offsets 0 2.

Exact both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to
from .sparse_packing import PackedSparse, join_nibbles, padded, split_nibbles

ALIGN = 128
"""Inputs that K is padded to a multiple of: the largest group of scales."""


def pack_panels(matrix: Tensor, bits: int) -> PackedSparse:
    """Encode codes of 4 bits `[N, K]`. Raises InputError for floats and for codes of 8 bits."""
    if matrix.dtype != torch.int8 or bits != 4:
        raise InputError(
            "The sparse layout 'panels' holds int4 codes",
            expected="torch.int8 of 4 bits",
            got=str(matrix.dtype) if matrix.dtype != torch.int8 else f"{bits} bits",
        )
    n, k = matrix.shape
    panels, words = ceil_to(n, LANES) // LANES, ceil_to(k, ALIGN) // 4
    whole = F.pad(matrix, (0, 4 * words - k, 0, panels * LANES - n))
    codes = whole.reshape(panels, LANES, words, 4).transpose(1, 2).reshape(panels, words, 4 * LANES)
    there = codes != 0
    bytes_of = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    places = (there.unflatten(2, (-1, 8)).to(torch.uint8) * bytes_of).sum(-1, dtype=torch.uint8)
    taken = ((there.sum(-1) + 1) // 2).sum(1)
    offsets = F.pad(taken, (1, 0)).cumsum(0).to(torch.int32)
    values = padded(join_nibbles(codes.reshape(-1, 4 * LANES)))
    return PackedSparse("panels", 4, places.reshape(panels, -1), values, offsets, n, k, int(there.sum()))


def unpack_panels(places: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    """Decode to int8 `[n, k]`."""
    panels, words = places.shape[0], places.shape[1] // 8
    there = ((places.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1, 4 * LANES).bool()
    codes = split_nibbles(values, there).reshape(panels, words, LANES, 4)
    return codes.transpose(1, 2).reshape(panels * LANES, -1)[:n, :k].contiguous()
