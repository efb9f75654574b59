"""Packed layouts of coded weights: the one encoder and the one decoder (formats: `element_formats.py`).

For codes c uint8 `[N, K]` with `Np = ceil(N, 16)`, `Kp = ceil(K, max(32, group_size))`; a panel is 16 rows, contiguous
over K. All layouts are uint8 `[Np/16, steps, 16, J]`: the third index is the row in its panel.

    4 bits:  P[b, s, r, j] = c[16 b + r, 8 s + j] | c[16 b + r, 8 s + 4 + j] << 4             [Np/16, Kp/8, 16, 4]
    8 bits:  P[b, s, r, j] = c[16 b + r, 2 s + j]                                             [Np/16, Kp/2, 16, 2]
    6 bits:  three steps for 8 inputs, each a little-endian 16-bit word of a row:             [Np/16, 3 Kp/8, 16, 2]
             word 3 s      low four bits of inputs 8 s + i,     i = 0..3, at bit 4 i
             word 3 s + 1  low four bits of inputs 8 s + 4 + i, i = 0..3, at bit 4 i
             word 3 s + 2  high two bits of inputs 8 s + i,     i = 0..7, at bit 2 i

4 bits is the layout of int4 with unsigned nibbles: a 64-byte vector holds 8 inputs of 16 rows. In the others 32
bytes hold 16 rows as 16-bit words, which a kernel shifts into the place of a float16's bits.

Example (one row, K = 8, codes 0 1 2 3 4 5 6 7), bytes of row 0: 4 bits, step 0: 0x40 0x51 0x62 0x73; 8 bits,
steps 0..3: 00 01, 02 03, 04 05, 06 07. Codes 0x21 0x12 0x03 0x34 0 0 0 0 of 6 bits: words 0x4321 (low four bits
1, 2, 3, 4), 0x0000, and 0x00C6 (high two bits 2, 1, 0, 3 at bits 0, 2, 4, 6).

Scales: `[Np/16, G, 16]`, `G = max(1, Kp / group_size)`: float32 (group_size 0), float16 (times the power of two
`scale_multiplier`, as for integers), E8M0 or E4M3 codes (uint8). `scale_multiplier` of nvfp4 is its float32 scale
of the tensor.
Rows >= N have zero codes and scales; columns >= K zero codes, which meet zero activations. All is BITWISE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .element_formats import (
    ElementFormat,
    check_codes,
    check_group_size,
    decode,
    element_format,
    scale_values,
)
from .packing import LANES, alignment, ceil_to, pack_groups, storable_scale, unpack_groups


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix as codes: codes uint8 `[N, K]`, scale `[N, G]` (float32 values, or uint8 codes of E8M0 or E4M3).

    multiplier: the tensor's scale (nvfp4), else 1. table: float32 `[16]` of table4.
    """

    codes: Tensor
    scale: Tensor
    multiplier: float
    table: Tensor | None
    format: str
    group_size: int

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight `[N, K]`."""
        return dequantize_codes(
            self.codes, self.scale, self.multiplier, self.table, self.format, self.group_size, dtype
        )


@dataclass(frozen=True)
class PackedCoded:
    """Tensors of one packed coded matrix and what decoding them needs."""

    weight: Tensor
    scale: Tensor
    table: Tensor | None
    n: int
    k: int
    format: str
    group_size: int
    scale_multiplier: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            t.numel() * t.element_size() for t in (self.weight, self.scale, self.table) if t is not None
        )


def dequantize_codes(
    codes: Tensor,
    scale: Tensor,
    multiplier: float | Tensor,
    table: Tensor | None,
    name: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`value[codes] * (scale * multiplier)` with a scale for each group of a row; exact up to these two roundings."""
    form = element_format(name)
    scales = scale_values(scale, form, dtype) * multiplier
    if group_size:
        scales = scales.repeat_interleave(group_size, 1)[:, : codes.shape[1]]
    return decode(codes, form, dtype, table) * scales


def pack_bits(codes: Tensor, bits: int, align: int) -> Tensor:
    """Codes uint8 `[N, K]` of 4, 6 or 8 bits → packed weight (layouts above); K is padded to a multiple of `align`."""
    n, k = codes.shape
    padded = F.pad(codes, (0, ceil_to(k, align) - k, 0, ceil_to(n, LANES) - n))
    blocks, columns = padded.shape[0] // LANES, padded.shape[1]
    if bits == 8:
        return padded.reshape(blocks, LANES, columns // 2, 2).permute(0, 2, 1, 3).contiguous()
    if bits == 4:
        nibbles = padded.reshape(blocks, LANES, columns // 8, 2, 4).permute(0, 2, 3, 1, 4)
        return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).contiguous()
    eight = padded.reshape(blocks, LANES, columns // 8, 8).permute(0, 2, 1, 3)
    low, high = eight & 15, eight >> 4
    pairs = low[..., 0::2] | (low[..., 1::2] << 4)  # bytes 0..3 of the two words of low bits
    top = high.unflatten(-1, (2, 4))
    top = top[..., 0] | (top[..., 1] << 2) | (top[..., 2] << 4) | (top[..., 3] << 6)
    steps = torch.stack([pairs[..., :2], pairs[..., 2:], top], dim=2)
    return steps.flatten(1, 2).contiguous()


def unpack_bits(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    """Packed weight → codes uint8 `[n, k]`; inverse of `pack_bits`."""
    blocks = packed.shape[0]
    if bits == 8:
        rows = packed.permute(0, 2, 1, 3).reshape(blocks * LANES, -1)
    elif bits == 4:
        both = torch.stack([packed & 15, packed >> 4], dim=2)
        rows = both.permute(0, 3, 1, 2, 4).reshape(blocks * LANES, -1)
    else:
        words = packed.unflatten(1, (-1, 3))
        pairs = torch.cat([words[:, :, 0], words[:, :, 1]], dim=-1)
        low = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
        top = words[:, :, 2]
        high = torch.stack([(top >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
        rows = (low | (high << 4)).permute(0, 2, 1, 3).reshape(blocks * LANES, -1)
    return rows[:n, :k].contiguous()


def scale_dtype(form: ElementFormat, group_size: int) -> torch.dtype:
    """Type of the stored scales."""
    if form.scale != "float":
        return torch.uint8
    return torch.float16 if group_size else torch.float32


def pack_coded(matrix: CodedMatrix) -> PackedCoded:
    """Pack a coded matrix. Raises InputError for codes of NaN or infinity and for scales that cannot be stored."""
    form, group_size = element_format(matrix.format), matrix.group_size
    check_group_size(form, group_size)
    check_codes(matrix.codes, matrix.scale, form, matrix.table)
    n, k = matrix.codes.shape
    scale, multiplier = matrix.scale, matrix.multiplier
    if form.scale == "float":
        stored, power = storable_scale(scale, group_size)
        if not torch.equal(stored, scale.to(torch.float32)):
            raise InputError(
                "Scales are not representable in the packed layout",
                expected="float16 values times a power of two (packing.storable_scale)",
                got=f"largest difference {float((stored - scale).abs().max()):.3g}",
                hint="round scales with packing.storable_scale before rounding the codes",
            )
        scale, multiplier = stored / power, multiplier * power
    return PackedCoded(
        weight=pack_bits(matrix.codes, form.bits, alignment(group_size)),
        scale=pack_groups(scale, k, group_size, scale_dtype(form, group_size)),
        table=matrix.table,
        n=n,
        k=k,
        format=matrix.format,
        group_size=group_size,
        scale_multiplier=multiplier,
    )


def unpack_coded(
    weight: Tensor,
    scale: Tensor,
    table: Tensor | None,
    n: int,
    k: int,
    name: str,
    group_size: int,
    scale_multiplier: float,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a packed coded matrix to `[n, k]` of `dtype` (float32 or float64): the truth every kernel answers to."""
    codes = unpack_bits(weight, n, k, element_format(name).bits)
    scales = unpack_groups(scale, n, k, group_size)
    return dequantize_codes(codes, scales, scale_multiplier, table, name, group_size, dtype)
