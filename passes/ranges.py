"""Rounding matrices to integer codes, and the search for the ranges they cover.

    W[n, k] ~ scale[n, g] (w[n, k] - zero[n, g]),   g = k // group_size   (group_size 0: one group a row)

`absmax` covers every value: scale = max |W| / largest code, or (max - min) / levels with a zero point. `mse`
looks for a narrower range with less squared error in each group: candidates on a grid, then the
least-squares scale for the codes found (the closed form <w, W> / <w, w>), kept only where it helps, so it is
never worse than `absmax` up to the rounding of the scale. A symmetric code of 4 bits or fewer has one level more
below zero (-8..7): the search may make the scale negative, which puts that level where the larger values are.

2 and 3 bits: zero points are multiples of 1/16 (`packing.zero_steps`), so the four or eight levels lie where the
values do, and need not hold 0 (padding is multiplied by activations of 0). The search moves both ends, in and out, and
fits the line scale (w - zero) to the codes found, twice: on normal values within 0.5 % of the error of a full grid.

Codes are rounded with the scale as it is stored (`packing.storable_scale`), so storing it adds no error.
Rows are worked through in chunks that stay in cache; results do not depend on the chunks or on threads,
as every reduction is within a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.dialect.packing import code_range, dequantize, storable_scale, zero_steps
from ..compiler.threads import one_thread

CHUNK = 1 << 15
"""Elements of a matrix that are searched at a time: few enough to stay in a core's cache."""

_SHRINK = {
    8: (0.96, 0.91, 0.86, 0.8),
    4: (0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.63, 0.58),
    3: (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45),
    2: (0.94, 0.88, 0.82, 0.77, 0.72, 0.67, 0.62, 0.57, 0.52, 0.47, 0.42, 0.37),
}
_SHRINK_END = {
    8: (0.97, 0.93, 0.88),
    4: (0.96, 0.92, 0.87, 0.82, 0.76, 0.69, 0.6),
    3: (1.25, 1.12, 0.94, 0.82, 0.67, 0.48),
    2: (1.25, 1.12, 0.92, 0.76, 0.59, 0.4),
}
_FITS = {8: 1, 4: 2, 3: 3, 2: 4}
"""Rounds of the closed form without zero points."""
_ROUNDS = {8: 1, 4: 1, 3: 2, 2: 2}
"""Rounds over the two ends, with zero points."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes int8 in the shape of the weight, scale float32 `[N, G]`, zero `[N, G]` or None: int8, float32 at 2 and 3
    bits.

    error: root mean square of the difference over that of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    error: float


def quantize_matrix(
    weight: Tensor, *, bits: int, group_size: int, symmetric: bool, search: str, storable: bool
) -> QuantizedMatrix:
    """Round `weight` float `[N, ...]` (flattened to `[N, K]`) to codes.

    search: `absmax` or `mse`. storable: round grouped scales to what a packed linear stores (embeddings
    store float32 as it is).
    """
    matrix = weight.detach().flatten(1)
    low, high = code_range(bits, symmetric)
    zero_is_a_code = symmetric or zero_steps(bits) == 1
    with torch.no_grad(), one_thread():
        found = [
            _symmetric(g, bits, search) if symmetric else _asymmetric(g, bits, search)
            for g in _grouped(matrix, group_size, zero_is_a_code)
        ]
        scale = torch.cat([s for s, _ in found])
        if storable:
            scale, _ = storable_scale(scale, group_size)
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = None if symmetric else _zero_of(torch.cat([z for _, z in found]) / divisor, bits)
        dead = scale == 0
        codes = torch.empty(matrix.shape, dtype=torch.int8)
        difference = energy = 0.0
        row = 0
        for g in _grouped(matrix, group_size, zero_is_a_code):
            rows = slice(row, row + g.shape[0])
            q = _rounded(g / divisor[rows, :, None], None if zero is None else zero[rows, :, None], low, high)
            q.masked_fill_(dead[rows, :, None], 0)
            codes[rows] = q.flatten(1)[:, : matrix.shape[1]].to(torch.int8)
            offset = q if zero is None else q.sub_(zero[rows, :, None])
            moved = offset.mul_(scale[rows, :, None]).sub_(g).square_()
            power = g.square()
            if not zero_is_a_code:
                moved, power = (t.flatten(1)[:, : matrix.shape[1]] for t in (moved, power))
            difference += float(moved.sum(-1).sum(dtype=torch.float64))
            energy += float(power.sum(-1).sum(dtype=torch.float64))
            row = rows.stop
    error = math.sqrt(difference / energy) if energy else 0.0
    if zero is not None and zero_steps(bits) == 1:
        zero = zero.to(torch.int8)
    return QuantizedMatrix(codes.reshape(weight.shape), scale, zero, error)


def _zero_of(low_end: Tensor, bits: int) -> Tensor:
    """The zero point of a range whose lower end is `low_end` steps from 0: as near as the layout stores it."""
    low, high = code_range(bits, False)
    steps = zero_steps(bits)
    if steps == 1:
        return (low - low_end.round()).clamp_(low, high)
    return ((low - low_end) * steps).round_().clamp_(-128, 127) / steps


def _rounded(steps: Tensor, zero: Tensor | float | None, low: int, high: int) -> Tensor:
    """Values in steps to codes, in place. Zero points that are whole are added after rounding, which is exact."""
    if zero is None:
        return steps.round_().clamp_(low, high)
    if high - low < 8:  # 2 and 3 bits
        return steps.add_(zero).round_().clamp_(low, high)
    return steps.round_().add_(zero).clamp_(low, high)


def requantized(weight: Tensor, like: QuantizedMatrix, *, bits: int, group_size: int) -> Tensor:
    """The float weight that `weight` rounds to with the scales and zero points found for one near it."""
    low, high = code_range(bits, like.zero is None)
    matrix = weight.detach().flatten(1)
    size = group_size or matrix.shape[1]
    scale = like.scale.repeat_interleave(size, 1)[:, : matrix.shape[1]]
    zero = 0 if like.zero is None else like.zero.repeat_interleave(size, 1)[:, : matrix.shape[1]]
    codes = _rounded(matrix / torch.where(scale == 0, torch.ones_like(scale), scale), zero, low, high)
    return codes.sub_(zero).mul_(scale).reshape(weight.shape)


def dequantized(quantized: QuantizedMatrix, group_size: int) -> Tensor:
    """The float weight that the codes stand for."""
    return dequantize(quantized.codes, quantized.scale, quantized.zero, group_size)


def _grouped(matrix: Tensor, group_size: int, zero_is_a_code: bool) -> Iterator[Tensor]:
    """Chunks of rows as float32 `[rows, G, group]`.

    The last group is filled up with zeros, which are exact, or, where 0 need not be a code, with its own values again.
    """
    n, k = matrix.shape
    size = group_size or k
    step = max(1, CHUNK // k)
    for start in range(0, n, step):
        rows = matrix[start : start + step].to(torch.float32)
        if k % size and not zero_is_a_code:
            last = rows[:, k - k % size :]
            rows = torch.cat([rows, last.repeat(1, -(-size // (k % size)))[:, : -k % size]], dim=1)
        yield F.pad(rows, (0, -rows.shape[1] % size)).reshape(rows.shape[0], -1, size)


def _squared_error(
    g: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Sum of squared differences for each group `[R, G]`, and the codes as float."""
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)[:, :, None]
    if zero is None:
        q = (g / divisor).round_().clamp_(low, high)
        return (q * divisor).sub_(g).square_().sum(-1), q
    at = zero[:, :, None]
    q = _rounded(g / divisor, at, low, high).sub_(at)
    return (q * divisor).sub_(g).square_().sum(-1), q


class _Best:
    """The least error so far of each group, and the candidate that had it."""

    def __init__(self, error: Tensor, scale: Tensor, low_end: Tensor) -> None:
        self.error, self.scale, self.low_end = error, scale, low_end

    def offer(self, error: Tensor, scale: Tensor, low_end: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.low_end = torch.where(better, low_end, self.low_end)


def _symmetric(g: Tensor, bits: int, search: str) -> tuple[Tensor, Tensor]:
    """Scale `[R, G]` without zero point (the second result is unused)."""
    low, high = code_range(bits, True)
    lowest, highest = g.amin(-1), g.amax(-1)
    largest = torch.maximum(-lowest, highest)
    absmax = largest / high
    if search == "absmax":
        return absmax, lowest
    best = _Best(_squared_error(g, absmax, None, low, high)[0], absmax, lowest)
    # The wider side of the codes takes the side of the largest value.
    full = torch.where(highest > -lowest, -largest, largest) / -low if -low > high else absmax
    for factor in (1.0, *_SHRINK[bits]) if -low > high else _SHRINK[bits]:
        scale = full * factor
        best.offer(_squared_error(g, scale, None, low, high)[0], scale, lowest)
    for _ in range(_FITS[bits]):
        _, q = _squared_error(g, best.scale, None, low, high)
        power = q.square().sum(-1)
        fitted = torch.where(power > 0, (q * g).sum(-1) / power.clamp_(min=1), best.scale)
        best.offer(_squared_error(g, fitted, None, low, high)[0], fitted, lowest)
    return best.scale, lowest


def _asymmetric(g: Tensor, bits: int, search: str) -> tuple[Tensor, Tensor]:
    """Scale and the lower end of the range `[R, G]`; `absmax` ranges and all with whole zero points contain 0."""
    low, high = code_range(bits, False)
    lowest, highest = g.amin(-1).clamp_(max=0), g.amax(-1).clamp_(min=0)

    def zero_of(scale: Tensor, from_low: Tensor) -> Tensor:
        return _zero_of(from_low / torch.where(scale == 0, torch.ones_like(scale), scale), bits)

    def candidate(from_low: Tensor, to_high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = (to_high - from_low) / (high - low)
        error = _squared_error(g, scale, zero_of(scale, from_low), low, high)[0]
        return torch.where(scale > 0, error, torch.inf), scale, from_low

    best = _Best(*candidate(lowest, highest))
    if search == "absmax":
        return best.scale, best.low_end
    if zero_steps(bits) > 1:
        lowest, highest = g.amin(-1), g.amax(-1)
        best.offer(*candidate(lowest, highest))
    for factor in _SHRINK[bits]:
        best.offer(*candidate(lowest * factor, highest * factor))
    for _ in range(_ROUNDS[bits]):
        top = best.low_end + best.scale * (high - low)
        for factor in _SHRINK_END[bits]:
            best.offer(*candidate(best.low_end, top * factor))
        top = best.low_end + best.scale * (high - low)
        bottom = best.low_end
        for factor in _SHRINK_END[bits]:
            best.offer(*candidate(bottom * factor, top))
        if zero_steps(bits) == 1:
            continue
        q = _squared_error(g, best.scale, zero_of(best.scale, best.low_end), low, high)[1]
        around, values = q - q.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True)
        power = around.square().sum(-1)
        scale = torch.where(power > 0, (around * values).sum(-1) / power.clamp_(min=1e-6), best.scale)
        # q is w - zero: the line through the means, at w = low.
        from_low = g.mean(-1) + scale * (low - zero_of(best.scale, best.low_end) - q.mean(-1))
        best.offer(*candidate(from_low, from_low + scale * (high - low)))
    return best.scale, best.low_end
