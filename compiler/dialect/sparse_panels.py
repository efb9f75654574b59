"""The layout `panels` of sparse int4 matrices: a bitmask in the order in which dense kernels read, two panels at once.

16 rows are a panel. A *word* is 64 bits, 16 rows by 4 inputs; words of two neighbouring panels stand side by side, and
a byte of values holds a code of each. P = ceil(N / 16) panels, Q = ceil(P / 2) pairs, `C = 32 ceil(K / 128)`:

    places   uint8  [Q, 16 C]    bit 4 r + j of word 2 c + h of pair q is 1 where w[32 q + 16 h + r, 4 c + j] != 0
    values   uint8  [V]          low nibbles: the codes of panel 2 q in the order of its words and their bits, from
                                 offsets[q] on; high nibbles: those of panel 2 q + 1, from the same byte on
    offsets  int32  [Q + 1]      bytes of values in front of each pair: of its two panels the one with more codes counts

Codes are in two's complement. V is offsets[Q] + 64, rounded up to a multiple of 64; nibbles that hold no code are 0.
Bits a weight: 1 + 4 * density, and what one panel of a pair has more codes than the other.

Why by panels: sums of 16 rows lie in the lanes of one register, so that a scale for each 32 inputs is one multiply-add
for 512 weights (in a bitmask by rows: for 64), masks and values are read from front to back, and an expanded word is a
word of the panel that dense int8 kernels take. Why pairs: codes come apart by a mask and a shift, without a shuffle,
whose ports the expansion needs.

Example (K = 5, one row, w = 0 7 0 0 -2): word 0 of pair 0 has bit 1, word 2 (c = 1) bit 0: bytes 0 and 16 of places
are 2 and 1, the rest 0; values 0x07 0x0E 0 ...; offsets 0 2. With a row 16 of 3 0 0 0 0, byte 8 of places would be 1
and the first value 0x37.

Exact both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to
from .sparse_packing import PackedSparse, padded

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
    pairs, words = ceil_to(n, 2 * LANES) // (2 * LANES), ceil_to(k, ALIGN) // 4
    whole = F.pad(matrix, (0, 4 * words - k, 0, 2 * LANES * pairs - n)).reshape(pairs, 2, LANES, words, 4)
    there = (whole != 0).permute(0, 3, 1, 2, 4).reshape(pairs, words * 2 * LANES * 4)
    places = (there.unflatten(1, (-1, 8)).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(
        -1, dtype=torch.uint8
    )
    codes = whole.transpose(2, 3).reshape(pairs, 2, -1)
    index, taken = _bytes(codes != 0)
    offsets = F.pad(taken, (1, 0)).cumsum(0).to(torch.int32)
    nibbles = torch.zeros(2, int(taken.sum()), dtype=torch.uint8)
    for half in range(2):
        found = codes[:, half] != 0
        nibbles[half, index[:, half][found]] = (codes[:, half][found] & 15).to(torch.uint8)
    values = padded(nibbles[0] | (nibbles[1] << 4))
    return PackedSparse("panels", 4, places, values, offsets, n, k, int(there.sum()))


def unpack_panels(places: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    """Decode to int8 `[n, k]`."""
    pairs, words = places.shape[0], places.shape[1] // 16
    bits = (places.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    there = bits.bool().reshape(pairs, words, 2, -1).transpose(1, 2).reshape(pairs, 2, -1)
    index, _ = _bytes(there)
    codes = torch.zeros(there.shape, dtype=torch.int8)
    for half in range(2):
        found = there[:, half]
        nibbles = (values[index[:, half][found]] >> (4 * half)) & 15
        codes[:, half][found] = (nibbles.to(torch.int8) ^ 8) - 8
    whole = codes.reshape(pairs, 2, words, LANES, 4).transpose(2, 3)
    return whole.reshape(2 * LANES * pairs, -1)[:n, :k].contiguous()


def _bytes(there: Tensor) -> tuple[Tensor, Tensor]:
    """Byte of values of each code of `[Q, 2, ...]`, and how many bytes each pair takes."""
    rank = there.cumsum(-1)
    taken = rank[..., -1].amax(-1)
    return rank - 1 + (taken.cumsum(0) - taken)[:, None, None], taken
