"""Grids that a matrix already lies on: codes and scales of a weight that another tool has rounded.

    W[n, k] = round(scale[n, g] level[n, k]),   g = k // group_size   (group_size 0: one group a row)

Levels are whole numbers (int2 to int8, with whole zero points where they lie to one side) or the values of a format of
small floats; `round` is to the type that the values were written in: float32, or float16 or bfloat16 where all of them
are such numbers. The largest magnitude of a group, its range, and the least distance between two of its values are its
scale times one of a few numbers, which gives candidates. With the levels nearest to the values in steps of a candidate,
each value bounds the scale to an interval, as wide as what is rounded to it; the group lies on the grid where all these
intervals meet, and any scale in there gives its values back. Of those, one with a short mantissa is taken, which the
packed layouts store as it is. Values that were not rounded miss nearly every level, so a few groups tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..compiler.dialect.element_formats import FORMATS, ElementFormat, decode, encode
from ..compiler.dialect.packing import code_range
from ..compiler.dialect.packing_coded import CodedMatrix
from .code_ranges import grouped
from .ranges import QuantizedMatrix

_SAMPLES = (2, 64)
"""Groups that are tried before all of them."""
_SAMPLED = 1 << 18
"""Elements of a sample at most."""


@dataclass(frozen=True)
class _Levels:
    """What may stand beside a scale.

    candidates: groups `[M, size]` without zeros only → scales `[M]` to try, likely ones first. snap: values divided by
    their scale → the nearest levels. allowed: levels `[M, size]` → which groups a format can hold. powers: scales are
    powers of two.
    """

    candidates: tuple[Callable[[Tensor], Tensor], ...]
    snap: Callable[[Tensor], Tensor]
    allowed: Callable[[Tensor], Tensor]
    powers: bool = False


def integer_grid(
    weight: Tensor, bits: int, group_size: int, precision: int, zeros: bool = True
) -> QuantizedMatrix | None:
    """The codes of `weight` float32 `[N, ...]` (as `[N, K]`) if it lies on a grid of that many bits in such groups.

    precision: its `significant_bits`. zeros: whether zero points are allowed; there are none where no group needs one.
    """
    matrix = weight.detach().flatten(1)
    low, high = code_range(bits, symmetric=False)
    found = _scales(matrix, group_size, _whole_levels(low, high, zeros), precision)
    if found is None:
        return None
    scale = found
    levels = [(g / s[..., None]).round_() for g, s in _with_scales(matrix, group_size, scale)]
    least = torch.cat([chunk.amin(-1) for chunk in levels]).clamp(max=0)
    most = torch.cat([chunk.amax(-1) for chunk in levels]).clamp(min=0)
    turned = (most > high) & (-most >= low) & (-least <= high)
    sign = torch.where(turned, -1.0, 1.0)
    least, most = torch.where(turned, -most, least), torch.where(turned, -least, most)
    zero = (low - least).clamp(low, high)
    if not zeros or bool(((least >= low) & (most <= high)).all()):
        zero = torch.zeros_like(zero)
    codes = [
        (chunk * s[..., None] + z[..., None]).flatten(1)[:, : matrix.shape[1]]
        for chunk, s, z in zip(
            levels, *(t.split([len(c) for c in levels]) for t in (sign, zero)), strict=True
        )
    ]
    # Where a level is finer than the values' own rounding, the nearest one may lie one beyond the end.
    whole = torch.cat(codes).clamp_(low, high).to(torch.int8).reshape(weight.shape)
    stored = None if not bool(zero.any()) else zero.to(torch.int8) if bits >= 4 else zero
    return QuantizedMatrix(whole, scale * sign, stored, 0.0)


def element_grid(weight: Tensor, name: str, group_size: int, precision: int) -> CodedMatrix | None:
    """The same for codes of a format of `dialect.element_formats` with a float or a power of two as scale."""
    form = FORMATS[name]
    matrix = weight.detach()
    found = _scales(matrix, group_size, _element_levels(form), precision)
    if found is None:
        return None
    codes = [
        encode(g / s[..., None], form).flatten(1)[:, : matrix.shape[1]]
        for g, s in _with_scales(matrix, group_size, found)
    ]
    scale = found
    if form.scale == "e8m0":
        scale = (torch.frexp(found).exponent - 1 + 127).to(torch.uint8)
    return CodedMatrix(torch.cat(codes), scale, 1.0, None, name, group_size)


def significant_bits(matrix: Tensor) -> int:
    """How many bits of a mantissa the values need, as numbers of bfloat16 (8), float16 (11) or float32 (24)."""
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        if torch.equal(matrix.to(dtype).to(matrix.dtype), matrix):
            return bits
    return 24


def _whole_levels(low: int, high: int, zeros: bool) -> _Levels:
    def allowed(levels: Tensor) -> Tensor:
        least, most = levels.amin(-1).clamp(max=0), levels.amax(-1).clamp(min=0)
        if zeros:
            return most - least <= high - low
        return ((least >= low) & (most <= high)) | ((-most >= low) & (-least <= high))

    rest = range(high - low if zeros else -low, 0, -1)
    return _Levels(
        (
            *(partial(_by_largest, steps=t) for t in (high, -low)),
            *(partial(_by_range, steps=t) for t in (high - low, high - low - 1)),
            *(partial(_by_distance, steps=t) for t in (1, 2, 3)),
            *(partial(_by_largest, steps=t) for t in rest if t not in (high, -low)),
        ),
        torch.round,
        allowed,
    )


def _element_levels(form: ElementFormat) -> _Levels:
    values = form.values()
    magnitudes = sorted((float(v) for v in values if torch.isfinite(v) and v > 0), reverse=True)
    candidates: Sequence[Callable[[Tensor], Tensor]]
    if form.scale == "e8m0":
        # The specification's exponent is the first; a scale that is larger or smaller leaves out levels at an end.
        top = 2.0**form.largest_exponent
        candidates = [partial(_by_power, steps=top * 2.0**offset) for offset in (0, -1, 1, -2, 2, -3)]
    else:
        kept = magnitudes[:1] if form.is_table else magnitudes
        candidates = [partial(_by_largest, steps=magnitude) for magnitude in kept]
    return _Levels(
        tuple(candidates),
        lambda x: decode(encode(x, form), form, torch.float32),
        lambda levels: torch.ones(levels.shape[:-1], dtype=torch.bool),
        form.scale == "e8m0",
    )


def _by_largest(groups: Tensor, steps: float) -> Tensor:
    return groups.abs().amax(-1) / steps


def _by_range(groups: Tensor, steps: float) -> Tensor:
    return (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / steps


def _by_distance(groups: Tensor, steps: float) -> Tensor:
    """By the least distance between values that are further apart than roundings."""
    apart = groups.sort(-1).values.diff(dim=-1)
    largest = groups.abs().amax(-1, keepdim=True)
    return torch.where(apart > largest * 1e-3, apart, largest).amin(-1) / steps


def _by_power(groups: Tensor, steps: float) -> Tensor:
    exponent = torch.frexp(groups.abs().amax(-1)).exponent - 1
    return torch.ldexp(torch.ones(len(groups)), exponent) / steps


def _with_scales(matrix: Tensor, group_size: int, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    row = 0
    for g in grouped(matrix, group_size):
        yield g, scale[row : row + len(g)]
        row += len(g)


def _scales(matrix: Tensor, group_size: int, levels: _Levels, precision: int) -> Tensor | None:
    """Scales `[N, G]`, or None where some group lies on no grid."""
    if not matrix.numel():
        return None
    size = group_size or matrix.shape[1]
    for count in _SAMPLES:
        wanted = min(count, max(1, _SAMPLED // size))
        step = max(1, matrix.shape[0] // wanted)
        sample = torch.cat([g[:, 0] for g in grouped(matrix[::step][:wanted], group_size)])
        if _fit(sample, levels, precision) is None:
            return None
    found = []
    for g in grouped(matrix, group_size):
        scale = _fit(g.flatten(0, 1), levels, precision)
        if scale is None:
            return None
        found.append(scale.reshape(g.shape[:2]))
    return torch.cat(found)


def _fit(groups: Tensor, levels: _Levels, bits: int) -> Tensor | None:
    """A scale for each of `groups` `[M, size]` (1 for zeros), or None."""
    scale = torch.ones(len(groups))
    left = (groups != 0).any(-1).nonzero().flatten()
    for candidate in levels.candidates:
        if not len(left):
            break
        g = groups[left]
        fitted, right = _try(g, candidate(g), levels, bits)
        scale[left[right]] = fitted[right]
        left = left[~right]
    return None if len(left) else scale


def _try(g: Tensor, candidate: Tensor, levels: _Levels, bits: int) -> tuple[Tensor, Tensor]:
    """A scale near each candidate, and for which groups it gives every value back."""
    candidate = candidate.clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(0 if levels.powers else 1 if bits == 24 else 3):
        # The candidate is as coarse as the value that it comes from; the least squares over all are finer.
        at = levels.snap(g / candidate[:, None]).double()
        fitted = (at * g).sum(-1) / at.square().sum(-1).clamp(min=1e-300)
        candidate = torch.where(fitted > 0, fitted, candidate.double()).float()
    at = levels.snap(g / candidate[:, None])
    # Half a unit in the last place; float32 products of three factors are rounded twice.
    half = torch.ldexp(torch.ones_like(g), torch.frexp(g).exponent - 1 - bits) * (2.0 if bits == 24 else 1.0)
    size, value, half = at.abs().double(), g.abs().double(), half.double()
    used = size > 0
    low = torch.where(used, (value - half) / size, 0.0).amax(-1)
    high = torch.where(used, (value + half) / size, torch.inf).amin(-1)
    meant = (used == (value > 0)).all(-1) & (at * g >= 0).all(-1) & levels.allowed(at)
    if levels.powers:
        return candidate, meant & (low <= candidate) & (candidate <= high)
    return _shortest(low, high), meant & (low <= high)


def _shortest(low: Tensor, high: Tensor) -> Tensor:
    """A number in each interval, with a mantissa of 8, 11 or 24 bits, the shortest that there is."""
    middle = torch.where(torch.isfinite(high), (low + high) / 2, low)
    mantissa, exponent = torch.frexp(middle)
    chosen = middle.float()
    for bits in (11, 8):
        short = torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent)
        chosen = torch.where((low <= short) & (short <= high), short.float(), chosen)
    return chosen
