"""Packed weight layouts: the one encoder and the one decoder for PyTorch, ONNX and TVM.

The index formulas are those of docs/dialect.md. For a code matrix w `[N, K]` with `Np = ceil(N, 16)` and
`Kp = ceil(K, max(32, group_size))`:

    int8:  P[b, c, r, j] = w[16 b + r, 4 c + j]                               int8  [Np/16, Kp/4, 16, 4]
    int4:  P[b, c, r, j] = low nibble  w[16 b + r, 8 c + j]                    uint8 [Np/16, Kp/8, 16, 4]
                           high nibble w[16 b + r, 8 c + 4 + j]
    int2:  P[b, c, r, j] = bits 2q, 2q + 1: w[16 b + r, 16 c + 4 q + j]        uint8 [Np/16, Kp/16, 16, 4]
    int3:  with w_q = w[16 b + r, 32 c + 4 q + j], q = 0..7                    uint8 [Np/16, Kp/32, 3, 16, 4]
           P[b, c, p, r, j] = bits 5..7: w_(2p), bits 2..4: w_(2p + 1)
                              bits 0..1: the low two bits of w_6 (p = 0) and of w_7 (p = 1),
                                         the sign bits of w_6 and w_7 (p = 2, from the low bit)

all in two's complement. Six of the eight codes of an int3 block lie whole in one byte (a mask, or a shift and a
mask); planes of low bits and of sign bits would cost two operations more for each of the eight.

Examples (one row, b = c = r = 0): int4, w = 0 1 2 3 -1 -2 -3 -4: bytes j = 0..3 are 0xF0, 0xE1, 0xD2, 0xC3 (low
nibbles 0 1 2 3, high nibbles -1 -2 -3 -4). int2, w = 0 0 0 0, 1 1 1 1, -2 -2 -2 -2, -1 -1 -1 -1: every byte is
0b11_10_01_00 = 0xE4. int3, w_0..w_7 = 0 1 2 3 -4 -3 -2 -1 for every j: w_6 = 0b110, w_7 = 0b111, bytes of the planes
0b000_001_10, 0b010_011_11 and 0b100_101_11.

Rows >= N and columns >= K are zero codes with scale 0. Both directions are exact (BITWISE).

Zero points of int2 and int3 are stored in sixteenths of a code (:func:`zero_steps`): four levels centred on a group's
values are worth more than a level at 0 exactly (for normal values in groups of 32 whole zero points gain nothing over
none at 2 bits, sixteenths 20 % of the squared error).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError

LANES = 16
"""Output features that share one 64-byte vector of weights."""


def ceil_to(a: int, b: int) -> int:
    """`a` rounded up to a multiple of `b` (works on symbolic integers too)."""
    return (a + b - 1) // b * b


def alignment(group_size: int) -> int:
    """Multiple to which K is padded: `max(32, group_size)`."""
    return max(32, group_size)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code. Symmetric int8 leaves out -128, so that a sign flip is always possible."""
    if bits == 8:
        return (-127, 127) if symmetric else (-128, 127)
    if bits in (2, 3, 4):
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    raise InputError("Unknown weight width", expected="2, 3, 4 or 8 bits", got=f"{bits} bits")


def zero_steps(bits: int) -> int:
    """Steps in which zero points are stored, to one code: 16 for 2 and 3 bits, else 1."""
    return 16 if bits < 4 else 1


@dataclass(frozen=True)
class PackedLinear:
    """Tensors of one packed matrix, shaped as in docs/dialect.md, and what decoding them needs."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    wsum: Tensor
    n: int
    k: int
    bits: int
    group_size: int
    scale_multiplier: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.weight, self.scale, self.zero, self.wsum)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def storable_scale(scale: Tensor, group_size: int) -> tuple[Tensor, float]:
    """Round `scale` `[N, G]` to what the layout stores.

    Returns the rounded values (float32, same shape) and the power-of-two multiplier. Per-channel scales
    (group_size 0) are float32 and come back unchanged with multiplier 1. Quantizers call this before they
    round codes, so that no error is added by storing the scale.
    """
    scale = scale.to(torch.float32)
    if group_size == 0:
        return scale, 1.0
    largest = float(scale.abs().max())
    multiplier = 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
    return (scale / multiplier).to(torch.float16).to(torch.float32) * multiplier, multiplier


def pack_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes int8 `[N, K]` → packed weight (layout above)."""
    low, high = code_range(bits, symmetric=False)
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise InputError(
            "Codes to pack have the wrong type",
            expected="int8 [N, K]",
            got=f"{codes.dtype} {list(codes.shape)}",
        )
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise InputError(
            f"Codes do not fit {bits} bits",
            expected=f"{low}..{high}",
            got=f"{int(codes.min())}..{int(codes.max())}",
        )
    n, k = codes.shape
    padded = F.pad(codes, (0, ceil_to(k, alignment(group_size)) - k, 0, ceil_to(n, LANES) - n))
    blocks, columns = padded.shape[0] // LANES, padded.shape[1]
    if bits == 8:
        return padded.reshape(blocks, LANES, columns // 4, 4).permute(0, 2, 1, 3).contiguous()
    steps = 8 if bits == 3 else 8 // bits
    unsigned = (padded & ((1 << bits) - 1)).to(torch.uint8).reshape(blocks, LANES, -1, steps, 4)
    codes_of_step = unsigned.permute(3, 0, 2, 1, 4).unbind(0)
    if bits == 3:
        return _pack_int3(codes_of_step)
    packed = codes_of_step[0]
    for q in range(1, steps):
        packed = packed | (codes_of_step[q] << (bits * q))
    return packed.contiguous()


def _pack_int3(w: Sequence[Tensor]) -> Tensor:
    """Unsigned codes of the eight steps of each block, `[Np/16, Kp/32, 16, 4]` each, → the three planes."""
    rest = (w[6] & 3, w[7] & 3, (w[6] >> 2) | ((w[7] >> 2) << 1))
    return torch.stack([(w[2 * p] << 5) | (w[2 * p + 1] << 2) | rest[p] for p in range(3)], dim=2)


def _unpack_int3(packed: Tensor) -> list[Tensor]:
    """Inverse of `_pack_int3`."""
    planes = packed.unbind(2)
    whole = [field for plane in planes for field in (plane >> 5, (plane >> 2) & 7)]
    return [*whole, *((planes[i] & 3) | (((planes[2] >> i) & 1) << 2) for i in (0, 1))]


def unpack_codes(packed: Tensor, n: int, k: int, bits: int) -> Tensor:
    """Packed weight → codes int8 `[n, k]`; inverse of `pack_codes`."""
    blocks = packed.shape[0]
    if bits == 8:
        return packed.permute(0, 2, 1, 3).reshape(blocks * LANES, -1)[:n, :k].contiguous()
    mask, sign = (1 << bits) - 1, 1 << (bits - 1)
    fields = (packed >> (bits * q) for q in range(8 // bits))
    unsigned = _unpack_int3(packed) if bits == 3 else [field & mask for field in fields]
    signed = torch.stack([(code.to(torch.int8) ^ sign) - sign for code in unsigned], dim=2)
    return signed.permute(0, 3, 1, 2, 4).reshape(blocks * LANES, -1)[:n, :k].contiguous()


def pack_groups(values: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Per-group values `[N, G]` → `[Np/16, Gp, 16]` with zero padding, `Gp` the groups of the padded K."""
    n, g = values.shape
    groups = ceil_to(k, alignment(group_size)) // group_size if group_size else 1
    padded = F.pad(values, (0, groups - g, 0, ceil_to(n, LANES) - n))
    return padded.reshape(-1, LANES, groups).permute(0, 2, 1).to(dtype).contiguous()


def unpack_groups(packed: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """Inverse of `pack_groups`: `[Np/16, Gp, 16]` → `[n, ceil(k / group_size)]`."""
    groups = -(-k // group_size) if group_size else 1
    return packed.permute(0, 2, 1).reshape(-1, packed.shape[1])[:n, :groups].contiguous()


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """`scale * (codes - zero)` with groups along the last dimension of the flattened codes.

    codes int8 `[N, K]` or `[O, C, ...]`; scale and zero `[N, G]`, of any dtype. Result has the dtype
    of scale.
    """
    flat = codes.flatten(1).to(scale.dtype)
    k = flat.shape[1]
    if group_size:
        scale = scale.repeat_interleave(group_size, 1)[:, :k]
        zero = None if zero is None else zero.repeat_interleave(group_size, 1)[:, :k]
    centred = flat if zero is None else flat - zero.to(scale.dtype)
    return (centred * scale).reshape(codes.shape)


def row_sums(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """`dequantize(...).sum(1)` from integer sums of each group, so that no float matrix is made: `[N]`."""
    n, k = codes.shape
    size = group_size or k
    padded = F.pad(codes, (0, -k % size)) if k % size else codes
    sums = padded.reshape(n, -1, size).sum(-1, dtype=torch.int64).to(scale.dtype)
    if zero is not None:
        counts = torch.full((sums.shape[1],), size, dtype=scale.dtype)
        counts[-1] = k - size * (sums.shape[1] - 1)
        sums = sums - zero.to(scale.dtype) * counts
    return (scale * sums).sum(1)


def pack_linear(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> PackedLinear:
    """Pack a quantized matrix: codes int8 `[N, K]`, scale `[N, G]`, zero `[N, G]` or None.

    The scales must already be storable (`storable_scale`), and the zero points (int8, or float32 where they are not
    whole) in steps of `1 / zero_steps(bits)`, else packing would change the value. 2 and 3 bits need groups.
    """
    n, k = codes.shape
    if bits < 4 and not group_size:
        raise InputError(
            f"Weights of {bits} bits are stored in groups",
            expected="group_size 32, 64 or 128",
            got="group_size 0, one scale for a whole row",
        )
    stored, multiplier = storable_scale(scale, group_size)
    if not torch.equal(stored, scale.to(torch.float32)):
        raise InputError(
            "Scales are not representable in the packed layout",
            expected="float16 values times a power of two (packing.storable_scale)",
            got=f"largest difference {float((stored - scale).abs().max()):.3g}",
            hint="round scales with packing.storable_scale before rounding the codes",
        )
    wsum = row_sums(codes, scale.to(torch.float64), zero, group_size)
    return PackedLinear(
        weight=pack_codes(codes, bits, group_size),
        scale=pack_groups(stored / multiplier, k, group_size, torch.float16 if group_size else torch.float32),
        zero=None if zero is None else pack_groups(_stored_zero(zero, bits), k, group_size, torch.int8),
        wsum=F.pad(wsum, (0, ceil_to(n, LANES) - n)).to(torch.float32),
        n=n,
        k=k,
        bits=bits,
        group_size=group_size,
        scale_multiplier=multiplier,
    )


def zeros_fit(zero: Tensor | None, bits: int) -> bool:
    """Whether the layout can store these zero points (in codes) exactly."""
    if zero is None:
        return True
    stored = zero.to(torch.float32) * zero_steps(bits)
    return bool((stored == stored.round()).all() and (stored >= -128).all() and (stored <= 127).all())


def _stored_zero(zero: Tensor, bits: int) -> Tensor:
    """Zero points as they are stored: int8, `zero_steps(bits)` to a code."""
    steps = zero_steps(bits)
    if not zeros_fit(zero, bits):
        raise InputError(
            "Zero points are not representable in the packed layout",
            expected=f"multiples of 1/{steps} in {-128 / steps:g}..{127 / steps:g}",
            got=f"{float(zero.min()):g}..{float(zero.max()):g}",
        )
    return (zero.to(torch.float32) * steps).to(torch.int8)


def unpack_weight(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scale_multiplier: float,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a packed matrix to `[n, k]` of `dtype` (float32 or float64): the truth every kernel answers to."""
    codes = unpack_codes(weight, n, k, bits)
    scales = unpack_groups(scale, n, k, group_size).to(dtype) * scale_multiplier
    zeros = None if zero is None else unpack_groups(zero, n, k, group_size).to(dtype) / zero_steps(bits)
    return dequantize(codes, scales, zeros, group_size)


def interleave_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of a gated pair, interleaved in blocks of 16 after padding each half: `[N, ...] x 2 → [2 Np, ...]`.

    Rows 32 i .. 32 i + 15 are gate, 32 i + 16 .. 32 i + 31 up, so that one tile holds both factors.
    """
    halves = [
        F.pad(t, [0, 0] * (t.dim() - 1) + [0, ceil_to(t.shape[0], LANES) - t.shape[0]]) for t in (gate, up)
    ]
    blocks = torch.stack([h.unflatten(0, (-1, LANES)) for h in halves], dim=1)
    return blocks.flatten(0, 2)


def split_gated(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Inverse of `interleave_gated`: `[2 Np, ...]` → gate and up, each `[n, ...]`."""
    blocks = rows.unflatten(0, (-1, 2, LANES))
    return blocks[:, 0].flatten(0, 1)[:n], blocks[:, 1].flatten(0, 1)[:n]


def pack_embedding_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 `[V, D]` → int8 `[V, D]`, or for 4 bits uint8 `[V, ceil(D/2)]`, even indices in low nibbles."""
    if bits == 8:
        return codes.contiguous()
    nibbles = (F.pad(codes, (0, codes.shape[1] % 2)) & 0x0F).to(torch.uint8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()


def unpack_embedding_codes(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Inverse of `pack_embedding_codes` on any leading shape: `[..., bytes]` → int8 `[..., dim]`."""
    if bits == 8:
        return packed
    pair = torch.stack([((nibble.to(torch.int8) ^ 8) - 8) for nibble in (packed & 0x0F, packed >> 4)], dim=-1)
    return pair.flatten(-2)[..., :dim]
