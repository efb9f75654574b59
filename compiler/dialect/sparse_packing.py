"""Matrices with zeros, encoded: the one encoder and the one decoder, by layout.

A matrix `w [N, K]`, `Np = ceil(N, 16)`, becomes *places* (where values stand), *values* and *offsets*:

    bitmask          a bit for each input: any zeros                                       (here)
    panels           the same for int4, 32 rows at a time                                  (`sparse_panels`)
    windows          a byte for each value, its place in 256 inputs: few values            (`sparse_windows`)
    1:4, 2:4, 4:8    N values and N indices for every M inputs                             (`sparse_groups`)
    1x4, 16x1, 16x4  a bit, or a column number, for each block                             (`sparse_blocks`)

Bitmask, stored row by row, `Kw = ceil(K / 64)`:

    places   uint8  [Np, 8 Kw]   bit (k % 8) of places[n, k // 8] is 1 where w[n, k] != 0, else 0
    offsets  int32  [Np + 1]     offsets[n] = number of values in rows 0 .. n - 1
    values   [V]                 w[n, k] = values[offsets[n] + number of ones in front of bit k in row n's bits]

Eight bytes are one little-endian 64-bit *word*, so bit j of word c of row n is input `64 c + j`. V is the number of
values plus 64, rounded up to a multiple of 64 and filled up with zeros, so that kernels may load 64 values from
anywhere. Rows >= N have no ones. One bit for each weight and the values: `1 + density * bits` bits a weight. Values
are float32 or bfloat16 (its 16 bits, as uint16) for float activations, and codes for quantized ones: int8, or int4,
two to a byte (the low nibble first, two's complement), where every word begins a byte and offsets and V count bytes.

Why by rows: an expanding load of a row's word meets the same 64 inputs that every other row meets (one load of
activations, no broadcast), and the values of a row lie in the order of k, which is the list (k, value) that a
product with many rows of activations walks. One encoding therefore serves both.

Example (K = 5, one row, w = 0 7 0 0 -2): places 0b00010010 = 18, the rest 0; values 7 -2 0 0 ...; offsets
0 2 2 ... 2 (rows 1..15 are padding). With int4 values the first byte is 0xE7 and offsets are 0 1 1 ... 1.

All directions are exact (BITWISE), except that -0.0 is a zero and comes back as 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to
from .sparse_layouts import LAYOUTS

WORD = 64
"""Inputs of one word of a bitmask."""

MARGIN = 64
"""Values that may be read behind the last one."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16)
"""What values of float matrices may be stored as."""


@dataclass(frozen=True)
class PackedSparse:
    """Tensors of one sparse matrix, shaped as in the docstring of its layout's module. stored: values, padding not
    counted, filled-up blocks included."""

    layout: str
    bits: int
    places: Tensor
    values: Tensor
    offsets: Tensor
    n: int
    k: int
    stored: int

    @property
    def density(self) -> float:
        """Share of the matrix that is stored."""
        return self.stored / max(self.n * self.k, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.places, self.values, self.offsets))


def pack_sparse(matrix: Tensor, layout: str = "bitmask", bits: int = 8) -> PackedSparse:
    """Encode a matrix `[N, K]` of float32 or bfloat16 (`bits` then says nothing), or of int8 codes of `bits` bits.

    Raises InputError for another type, for NaN or infinity, for codes that do not fit, for a matrix that the layout
    cannot hold, and for 2^31 or more values.
    """
    from .sparse_blocks import BLOCKS, pack_blocks
    from .sparse_groups import GROUPS, pack_groups_of
    from .sparse_panels import pack_panels
    from .sparse_windows import pack_windows

    _check(matrix, bits)
    if layout not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise InputError("Unknown layout of a sparse matrix", expected=f"one of {known}", got=repr(layout))
    if layout == "windows":
        return pack_windows(matrix)
    if layout == "panels":
        return pack_panels(matrix, bits)
    if layout in GROUPS:
        return pack_groups_of(matrix, layout)
    packed = pack_blocks(matrix, layout) if layout in BLOCKS else _pack_bitmask(matrix, bits)
    return (
        replace(packed, values=packed.values.view(torch.uint16)) if matrix.dtype == torch.bfloat16 else packed
    )


def unpack_sparse(
    layout: str, places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int, bits: int = 8
) -> Tensor:
    """Decode to `[n, k]`: float32, bfloat16, or codes as int8. The truth every kernel answers to."""
    from .sparse_blocks import BLOCKS, unpack_blocks
    from .sparse_groups import GROUPS, unpack_groups_of
    from .sparse_panels import unpack_panels
    from .sparse_windows import unpack_windows

    if values.dtype == torch.uint16:
        values = values.view(torch.bfloat16)
    if layout == "windows":
        return unpack_windows(places, values, offsets, n, k)
    if layout == "panels":
        return unpack_panels(places, values, n, k)
    if layout in GROUPS:
        return unpack_groups_of(layout, places, values, n, k)
    if layout in BLOCKS:
        return unpack_blocks(layout, places, values, offsets, n, k)
    return _unpack_bitmask(places, values, n, k, bits)


def _check(matrix: Tensor, bits: int) -> None:
    if matrix.dim() != 2 or matrix.dtype not in (*FLOAT_DTYPES, torch.int8):
        raise InputError(
            "A matrix to pack as sparse has the wrong type",
            expected="torch.float32, torch.bfloat16 or torch.int8 [N, K]",
            got=f"{matrix.dtype} {list(matrix.shape)}",
        )
    if matrix.is_floating_point():
        if not torch.isfinite(matrix).all():
            raise InputError(
                "A sparse matrix holds NaN or infinity",
                got=f"{int((~torch.isfinite(matrix)).sum())} of {matrix.numel()} values",
                hint="check the checkpoint and how it was loaded",
            )
    elif bits not in (4, 8) or (
        bits == 4 and matrix.numel() and not -8 <= int(matrix.amin()) <= int(matrix.amax()) <= 7
    ):
        raise InputError(
            f"Codes of a sparse matrix do not fit {bits} bits",
            expected="4 bits: -8..7, or 8 bits",
            got=f"{int(matrix.min())}..{int(matrix.max())}" if matrix.numel() else "no codes",
        )
    if int((matrix != 0).sum()) >= 2**31 - MARGIN:
        raise InputError(
            "Too many values for one sparse matrix", expected="less than 2^31", got=str(matrix.numel())
        )


def padded(values: Tensor, count: int | None = None) -> Tensor:
    """Values `[V]` from the used ones: MARGIN more, rounded up to a multiple of 64 (`count`: how many there are)."""
    used = len(values) if count is None else count
    return F.pad(values[:used], (0, ceil_to(used + MARGIN, 64) - used)).contiguous()


def row_offsets(counts: Tensor, n: int) -> Tensor:
    """Offsets int32 `[ceil(n, 16) + 1]` from what each of n rows stores."""
    return F.pad(counts, (1, ceil_to(n, LANES) - n)).cumsum(0).to(torch.int32)


def pack_bits(there: Tensor) -> Tensor:
    """Booleans `[N, C]` to bits, uint8 `[ceil(N, 16), 8 ceil(C / 64)]`."""
    n, k = there.shape
    bits = F.pad(there, (0, ceil_to(k, WORD) - k, 0, ceil_to(n, LANES) - n)).to(torch.uint8)
    places = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (bits.unflatten(1, (-1, 8)) * places).sum(-1, dtype=torch.uint8)


def unpack_bits(places: Tensor) -> Tensor:
    """The inverse, with what was padded."""
    return ((places.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1).bool()


def _pack_bitmask(matrix: Tensor, bits: int) -> PackedSparse:
    n, k = matrix.shape
    there = matrix != 0
    stored = int(there.sum())
    if matrix.is_floating_point() or bits == 8:
        values, counts = matrix[there], there.sum(1)
        return PackedSparse(
            "bitmask", bits, pack_bits(there), padded(values), row_offsets(counts, n), n, k, stored
        )
    words = F.pad(there, (0, ceil_to(k, WORD) - k)).unflatten(1, (-1, WORD)).sum(-1)
    starts, total = _nibble_starts(words)
    nibbles = torch.zeros(2 * total, dtype=torch.uint8)
    nibbles[_nibble_index(there, starts)] = (matrix[there] & 15).to(torch.uint8)
    values = nibbles[::2] | (nibbles[1::2] << 4)
    counts = ((words + 1) // 2).sum(1)
    return PackedSparse("bitmask", 4, pack_bits(there), padded(values), row_offsets(counts, n), n, k, stored)


def _unpack_bitmask(places: Tensor, values: Tensor, n: int, k: int, bits: int) -> Tensor:
    there = unpack_bits(places)
    if bits == 4 and not values.is_floating_point():
        starts, _ = _nibble_starts(there.unflatten(1, (-1, WORD)).sum(-1))
        nibbles = torch.stack([values & 15, values >> 4], 1).flatten().to(torch.int8)
        found = ((nibbles ^ 8) - 8)[_nibble_index(there, starts)]
    else:
        found = values[: int(there.sum())]
    matrix = torch.zeros(there.shape, dtype=found.dtype)
    matrix[there] = found
    return matrix[:n, :k].contiguous()


def _nibble_starts(words: Tensor) -> tuple[Tensor, int]:
    """Byte at which the values of each word begin, and how many bytes there are, from how many values words have."""
    taken = ((words + 1) // 2).flatten()
    ends = taken.cumsum(0)
    return (ends - taken).reshape(words.shape), int(ends[-1]) if len(ends) else 0


def _nibble_index(there: Tensor, starts: Tensor) -> Tensor:
    """Index of the nibble of each value, in the order of `matrix[there]`."""
    whole = F.pad(there, (0, -there.shape[1] % WORD)).unflatten(1, (-1, WORD))
    inside = whole.cumsum(-1) - 1
    index = (2 * starts.unsqueeze(-1) + inside).flatten(1)[:, : there.shape[1]]
    return index[there]
