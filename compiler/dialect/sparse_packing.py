"""Unstructured sparse matrices as a bitmask and packed non-zeros: the one encoder and the one decoder.

For a matrix `w [N, K]` with `Np = ceil(N, 16)` and `Kw = ceil(K / 64)`, stored row by row:

    mask     uint8  [Np, 8 Kw]   bit (k % 8) of mask[n, k // 8] is 1 where w[n, k] != 0, else 0
    offsets  int32  [Np + 1]     offsets[n] = number of non-zeros in rows 0 .. n - 1
    values   [V]                 w[n, k] = values[offsets[n] + number of ones in front of bit k in row n's mask]

Eight bytes of the mask are one little-endian 64-bit word, so bit j of word c of row n is input `64 c + j`. V is the
number of non-zeros plus 16, rounded up to a multiple of 64 and filled up with zeros, so that kernels may load 16 values
from anywhere. Rows >= N have no ones. One bit for each weight and the values themselves: `1 + density * bits` bits a
weight. The value type is the matrix's own: float32 for float activations, int8 (codes) for quantized ones.

Why by rows: an expanding load of a row's word meets the same 64 inputs that every other row meets (one load of
activations, no broadcast), and the non-zeros of a row lie in the order of k, which is the list (k, value) that a
product with many rows of activations walks. One encoding therefore serves both.

Example (K = 5, one row, w = 0 7 0 0 -2): mask byte 0 is 0b00010010 = 18, the rest 0; values 7 -2 0 0 ...; offsets
0 2 2 ... 2 (rows 1..15 are padding).

Both directions are exact (BITWISE), except that -0.0 is a zero and comes back as 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to

WORD = 64
"""Inputs of one word of the mask."""

VALUE_DTYPES = (torch.float32, torch.int8)
"""What non-zeros may be stored as."""


@dataclass(frozen=True)
class PackedSparse:
    """Tensors of one sparse matrix, shaped as in the module's docstring."""

    mask: Tensor
    values: Tensor
    offsets: Tensor
    n: int
    k: int

    @property
    def nonzeros(self) -> int:
        """How many values are stored, padding not counted."""
        return int(self.offsets[-1])

    @property
    def density(self) -> float:
        """Share of the matrix that is not zero."""
        return self.nonzeros / max(self.n * self.k, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.mask, self.values, self.offsets))


def sparse_bytes(n: int, k: int, nonzeros: int, value_bytes: int) -> int:
    """Bytes of the encoding of an `[n, k]` matrix with that many non-zeros."""
    rows = ceil_to(n, LANES)
    return rows * ceil_to(k, WORD) // 8 + value_bytes * padded_values(nonzeros) + 4 * (rows + 1)


def padded_values(nonzeros: int) -> int:
    """V of the module's docstring."""
    return ceil_to(nonzeros + 16, WORD)


def pack_sparse(matrix: Tensor) -> PackedSparse:
    """Encode a matrix `[N, K]` of float32 or int8.

    Raises InputError for another type, for NaN or infinity, and for 2^31 or more non-zeros.
    """
    if matrix.dim() != 2 or matrix.dtype not in VALUE_DTYPES:
        raise InputError(
            "A matrix to pack as sparse has the wrong type",
            expected=" or ".join(str(d) for d in VALUE_DTYPES) + " [N, K]",
            got=f"{matrix.dtype} {list(matrix.shape)}",
        )
    if matrix.is_floating_point() and not torch.isfinite(matrix).all():
        raise InputError(
            "A sparse matrix holds NaN or infinity",
            got=f"{int((~torch.isfinite(matrix)).sum())} of {matrix.numel()} values",
            hint="check the checkpoint and how it was loaded",
        )
    n, k = matrix.shape
    there = matrix != 0
    counts = F.pad(there.sum(1), (1, ceil_to(n, LANES) - n)).cumsum(0)
    total = int(counts[-1])
    if total >= 2**31:
        raise InputError(
            "Too many non-zeros for one sparse matrix", expected="less than 2^31", got=str(total)
        )
    bits = F.pad(there, (0, ceil_to(k, WORD) - k, 0, ceil_to(n, LANES) - n)).to(torch.uint8)
    places = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    mask = (bits.unflatten(1, (-1, 8)) * places).sum(-1, dtype=torch.uint8)
    values = F.pad(matrix[there], (0, padded_values(total) - total))
    return PackedSparse(mask, values.contiguous(), counts.to(torch.int32), n, k)


def unpack_sparse(mask: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    """Decode to `[n, k]` in the type of `values`: the truth every kernel answers to."""
    places = torch.arange(8, dtype=torch.uint8)
    there = ((mask.unsqueeze(-1) >> places) & 1).flatten(1).bool()
    matrix = torch.zeros(there.shape, dtype=values.dtype)
    matrix[there] = values[: int(there.sum())]
    return matrix[:n, :k].contiguous()
