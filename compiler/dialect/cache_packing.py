"""Keys and values as codes: the one encoder and the one decoder.

Unsigned codes u of 8 or 4 bits with one pair (scale, zero point) for each token and head, `x ~ s (u - z)`, as
`quantize_activation` makes them; `Dp = ceil(D, 32)`, columns d >= D are zero codes:

    8 bits  uint8 [..., Dp]       P[d] = u[d]
    4 bits  uint8 [..., Dp / 2]   P[16 c + j]: low nibble u[32 c + j], high nibble u[32 c + 16 + j]

so that 16 bytes are two vectors of 16 consecutive dimensions (a mask and a shift). The pairs are float32 `[..., 2]`.

With groups inside a head (of a multiple of 32 dimensions that divides D) each has a pair of its own, one after the
other: `[..., 2 G]`, G = D / group. The bytes are those of the head cut into G short ones, so that every rule for heads
holds for groups. Bits for each element with D = 128: 8.5 and 4.5 (of float32's 32); in groups of 32, 10 and 6.

Example (D = 3, 4 bits, u = 5 15 2): bytes 0x05 0x0F 0x02 0x00 ... Both directions are exact (BITWISE).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import ceil_to

ALIGN = 32
"""Dimensions of a head are padded to a multiple of this."""


def check_width(bits: int) -> None:
    """Raises InputError for other widths than 4 and 8."""
    if bits not in (4, 8):
        raise InputError("Keys and values have no codes of this width", expected="bits 4 | 8", got=str(bits))


def check_group(group: int, *depths: int) -> None:
    """Raises InputError where groups do not cut heads of these sizes into whole blocks."""
    if group and (group % ALIGN or any(depth % group for depth in depths)):
        raise InputError(
            "Heads cannot be cut into these groups",
            expected=f"a multiple of {ALIGN} that divides {' and '.join(map(str, depths))}",
            got=str(group),
        )


def pair_count(depth: int, group: int) -> int:
    """Pairs of one token and head; group 0: the whole head."""
    return depth // group if group else 1


def cut(x: Tensor, parts: int) -> Tensor:
    """The last dimension in that many parts, `[..., parts, -1]`."""
    return x.unflatten(-1, (parts, -1))


def row_bytes(depth: int, bits: int) -> int:
    """Bytes of the codes of one token and head."""
    return ceil_to(depth, ALIGN) * bits // 8


def pack_cache_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[..., D]` → packed."""
    check_width(bits)
    depth = codes.shape[-1]
    padded = F.pad(codes, (0, ceil_to(depth, ALIGN) - depth))
    if bits == 8:
        return padded.contiguous()
    halves = padded.unflatten(-1, (-1, 2, 16))
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(-2).contiguous()


def unpack_cache_codes(packed: Tensor, depth: int, bits: int) -> Tensor:
    """Inverse of `pack_cache_codes`: uint8 `[..., depth]`."""
    check_width(bits)
    if bits == 8:
        return packed[..., :depth].contiguous()
    blocks = packed.unflatten(-1, (-1, 1, 16))
    return torch.cat([blocks & 15, blocks >> 4], dim=-2).flatten(-3)[..., :depth].contiguous()
