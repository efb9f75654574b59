"""Rounding matrices to integer codes, and the search for the ranges they cover.

    W[n, k] ~ scale[n, g] (w[n, k] - zero[n, g]),   g = k // group_size   (group_size 0: one group a row)

`absmax` covers every value: scale = max |W| / largest code, or (max - min) / levels with a zero point. `mse`
looks for a narrower range with less squared error in each group: candidates on a grid, then the
least-squares scale for the codes found (the closed form <w, W> / <w, w>), kept only where it helps, so it is
never worse than `absmax` up to the rounding of the scale. A symmetric 4-bit code has one level more below
zero (-8..7): the search may make the scale negative, which puts that level where the larger values are.

Codes are rounded with the scale as it is stored (`packing.storable_scale`), so storing it adds no error.
Rows are worked through in chunks that stay in cache; results do not depend on the chunks or on threads,
as every reduction is within a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.dialect.packing import code_range, dequantize, storable_scale

CHUNK = 1 << 15
"""Elements of a matrix that are searched at a time: few enough to stay in a core's cache."""

_SHRINK = {8: (0.96, 0.91, 0.86, 0.8), 4: (0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.63, 0.58)}
_SHRINK_END = {8: (0.97, 0.93, 0.88), 4: (0.96, 0.92, 0.87, 0.82, 0.76, 0.69, 0.6)}


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes int8 in the shape of the weight, scale float32 `[N, G]`, zero int8 `[N, G]` or None.

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
    with torch.no_grad(), _one_thread():
        found = [
            _symmetric(g, bits, search) if symmetric else _asymmetric(g, bits, search)
            for g in _grouped(matrix, group_size)
        ]
        scale = torch.cat([s for s, _ in found])
        if storable:
            scale, _ = storable_scale(scale, group_size)
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = None if symmetric else (torch.cat([z for _, z in found]) / divisor).round_().neg_().add_(low)
        zero = None if zero is None else zero.clamp_(low, high)
        dead = scale == 0
        codes = torch.empty(matrix.shape, dtype=torch.int8)
        difference = energy = 0.0
        row = 0
        for g in _grouped(matrix, group_size):
            rows = slice(row, row + g.shape[0])
            q = (g / divisor[rows, :, None]).round_()
            q = (q if zero is None else q.add_(zero[rows, :, None])).clamp_(low, high)
            q.masked_fill_(dead[rows, :, None], 0)
            codes[rows] = q.flatten(1)[:, : matrix.shape[1]].to(torch.int8)
            offset = q if zero is None else q.sub_(zero[rows, :, None])
            moved = offset.mul_(scale[rows, :, None]).sub_(g)
            difference += float(moved.square_().sum(-1).sum(dtype=torch.float64))
            energy += float(g.square().sum(-1).sum(dtype=torch.float64))
            row = rows.stop
    error = math.sqrt(difference / energy) if energy else 0.0
    return QuantizedMatrix(
        codes.reshape(weight.shape), scale, None if zero is None else zero.to(torch.int8), error
    )


def requantized(weight: Tensor, like: QuantizedMatrix, *, bits: int, group_size: int) -> Tensor:
    """The float weight that `weight` rounds to with the scales and zero points found for one near it."""
    low, high = code_range(bits, like.zero is None)
    matrix = weight.detach().flatten(1)
    size = group_size or matrix.shape[1]
    scale = like.scale.repeat_interleave(size, 1)[:, : matrix.shape[1]]
    zero = 0 if like.zero is None else like.zero.repeat_interleave(size, 1)[:, : matrix.shape[1]]
    codes = (matrix / torch.where(scale == 0, torch.ones_like(scale), scale)).round_().add_(zero)
    return codes.clamp_(low, high).sub_(zero).mul_(scale).reshape(weight.shape)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operators this small lose more at the barriers of torch's threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dequantized(quantized: QuantizedMatrix, group_size: int) -> Tensor:
    """The float weight that the codes stand for."""
    return dequantize(quantized.codes, quantized.scale, quantized.zero, group_size)


def _grouped(matrix: Tensor, group_size: int) -> Iterator[Tensor]:
    """Chunks of rows as float32 `[rows, G, group]`; the last group is filled up with zeros, which are exact."""
    n, k = matrix.shape
    size = group_size or k
    step = max(1, CHUNK // k)
    for start in range(0, n, step):
        rows = matrix[start : start + step].to(torch.float32)
        yield F.pad(rows, (0, -k % size)).reshape(rows.shape[0], -1, size)


def _squared_error(
    g: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Sum of squared differences for each group `[R, G]`, and the codes as float."""
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)[:, :, None]
    if zero is None:
        q = (g / divisor).round_().clamp_(low, high)
        return (q * divisor).sub_(g).square_().sum(-1), q
    at = zero[:, :, None]
    q = (g / divisor).round_().add_(at).clamp_(low, high).sub_(at)
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
    for _ in range(2 if bits == 4 else 1):
        _, q = _squared_error(g, best.scale, None, low, high)
        power = q.square().sum(-1)
        fitted = torch.where(power > 0, (q * g).sum(-1) / power.clamp_(min=1), best.scale)
        best.offer(_squared_error(g, fitted, None, low, high)[0], fitted, lowest)
    return best.scale, lowest


def _asymmetric(g: Tensor, bits: int, search: str) -> tuple[Tensor, Tensor]:
    """Scale and the lower end of the range `[R, G]`; the range always contains 0."""
    low, high = code_range(bits, False)
    lowest, highest = g.amin(-1).clamp_(max=0), g.amax(-1).clamp_(min=0)

    def candidate(from_low: Tensor, to_high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = (to_high - from_low) / (high - low)
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (low - (from_low / divisor).round_()).clamp_(low, high)
        return _squared_error(g, scale, zero, low, high)[0], scale, from_low

    best = _Best(*candidate(lowest, highest))
    if search == "absmax":
        return best.scale, best.low_end
    for factor in _SHRINK[bits]:
        best.offer(*candidate(lowest * factor, highest * factor))
    top = best.low_end + best.scale * (high - low)
    for factor in _SHRINK_END[bits]:
        best.offer(*candidate(best.low_end, top * factor))
    top = best.low_end + best.scale * (high - low)
    bottom = best.low_end
    for factor in _SHRINK_END[bits]:
        best.offer(*candidate(bottom * factor, top))
    return best.scale, best.low_end
