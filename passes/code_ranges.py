"""Rounding matrices to codes of tables and small floats, and the search for the scales of their groups.

    W[n, k] ~ value[c[n, k]] scale[n, g] multiplier,   g = k // group_size   (group_size 0: one group a row)

`absmax` brings the largest weight of a group to the format's largest value; for MX it is the specification's rule, the
exponent floor(log2 max |W|) - emax, for NVFP4 the tensor's scale max |W| / (448 * 6) first. `mse` tries narrower
scales (MX: the exponents beside) and keeps for each group the one with the least squared error, so it is never worse.
Codes are rounded with the scale as it is stored.

The entries of a `table4` are fitted to the layer: Lloyd's algorithm (k-means in one dimension) over the weights divided
by their group's absolute maximum, weighted with its square, as that is what an error costs; the best of three starts
(NF4, even steps, quantiles).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.dialect.element_formats import (
    FORMATS,
    ElementFormat,
    decode,
    element_format,
    encode,
    scale_values,
)
from ..compiler.dialect.packing import storable_scale
from ..compiler.dialect.packing_coded import CodedMatrix

CHUNK = 1 << 18
"""Elements of a matrix that are worked on at a time."""

_SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
_EXPONENTS = (0, 1, -1)
_SAMPLE = 1 << 18
_LLOYD_STEPS = 30


def quantize_codes(weight: Tensor, name: str, group_size: int, search: str) -> CodedMatrix:
    """Round `weight` float `[N, K]` to codes of the format `name`. search: `absmax` or `mse`.

    Raises InputError for NaN and infinity.
    """
    form = element_format(name)
    matrix = weight.detach().to(torch.float32)
    multiplier = _tensor_scale(matrix, form)
    table = fitted_table(matrix, group_size) if name == "table4" else None
    scales = [_scales(g, form, multiplier, table, search) for g in grouped(matrix, group_size)]
    scale = torch.cat(scales)
    if form.scale == "float":
        scale, _ = storable_scale(scale, group_size)
    codes = [
        _codes(g, s, form, multiplier, table)[1]
        for g, s in zip(grouped(matrix, group_size), scale.split([len(s) for s in scales]), strict=True)
    ]
    flat = torch.cat([c.flatten(1)[:, : matrix.shape[1]] for c in codes])
    return CodedMatrix(flat, scale, multiplier, table, name, group_size)


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    """Root mean square of the difference over that of the weight."""
    energy = float(weight.double().square().sum())
    return math.sqrt(float((rounded.double() - weight.double()).square().sum()) / energy) if energy else 0.0


def fitted_table(matrix: Tensor, group_size: int) -> Tensor:
    """The 16 entries, ascending float32, that `matrix` `[N, K]` in groups of `group_size` is best rounded to."""
    values, weights = [], []
    for g in grouped(matrix, group_size):
        largest = g.abs().amax(-1, keepdim=True)
        values.append((g / torch.where(largest > 0, largest, 1.0)).flatten())
        weights.append(largest.double().square().expand_as(g).flatten())
    x, w = torch.cat(values), torch.cat(weights)
    stride = max(1, len(x) // _SAMPLE)
    x, order = x[::stride].sort()
    w = w[::stride][order]
    w = w / w.sum().clamp(min=1e-300)
    sums = F.pad(torch.stack([w, w * x, w * x.double().square()]).cumsum(1), (1, 0))
    shares = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    quantiles = x[torch.searchsorted(sums[0, 1:].contiguous(), shares).clamp(max=len(x) - 1)].double()
    starts = (FORMATS["nf4"].values(), torch.linspace(-1, 1, 16, dtype=torch.float64), quantiles)
    fitted = [_lloyd(x, sums, start) for start in starts]
    return min(fitted, key=lambda found: found[0])[1].to(torch.float32)


def _lloyd(x: Tensor, sums: Tensor, table: Tensor) -> tuple[float, Tensor]:
    """Squared error and entries: each moves to the mean of what is nearest to it, until none does.

    x: sorted values; sums: `[3, len(x) + 1]`, running sums of weights times 1, x and x^2.
    """
    for _ in range(_LLOYD_STEPS):
        ends = torch.searchsorted(x, ((table[:-1] + table[1:]) / 2).float(), right=True)
        edges = F.pad(F.pad(ends, (1, 0)), (0, 1), value=len(x))
        mass, moment, power = (sums[:, edges[1:]] - sums[:, edges[:-1]]).unbind()
        moved = torch.where(mass > 0, moment / mass.clamp(min=1e-300), table).sort().values
        error = float((power - 2 * moment * moved + mass * moved.square()).sum())
        if torch.equal(moved, table):
            break
        table = moved
    return error, table


def _tensor_scale(matrix: Tensor, form: ElementFormat) -> float:
    """NVFP4's float32 scale of the tensor, else 1."""
    if form.scale != "e4m3":
        return 1.0
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    scale = torch.tensor(largest / (FORMATS["e4m3"].largest * form.largest), dtype=torch.float32)
    return float(scale) if float(scale) > 0 else 1.0


def grouped(matrix: Tensor, group_size: int) -> Iterator[Tensor]:
    """Chunks of rows as `[rows, G, group]`; the last group is filled up with zeros."""
    n, k = matrix.shape
    size = group_size or k
    step = max(1, CHUNK // k)
    for start in range(0, n, step):
        rows = matrix[start : start + step]
        yield F.pad(rows, (0, -k % size)).reshape(rows.shape[0], -1, size)


def _codes(
    g: Tensor, scale: Tensor, form: ElementFormat, multiplier: float, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Squared error of each group `[R, G]`, and the codes `[R, G, group]`."""
    factor = (scale_values(scale, form, torch.float32) * multiplier)[:, :, None]
    codes = encode(g / torch.where(factor > 0, factor, 1.0), form, table)
    return (decode(codes, form, torch.float32, table) * factor - g).square().sum(-1), codes


def _scales(g: Tensor, form: ElementFormat, multiplier: float, table: Tensor | None, search: str) -> Tensor:
    """Scales `[R, G]` as they are stored (floats not yet rounded)."""
    best: Tensor | None = None
    error = torch.full(g.shape[:2], torch.inf)
    for candidate in _candidates(g, form, multiplier, table, search):
        moved, _ = _codes(g, candidate, form, multiplier, table)
        better = moved < error
        best = candidate if best is None else torch.where(better, candidate, best)
        error = torch.where(better, moved, error)
    assert best is not None
    return best


def _candidates(
    g: Tensor, form: ElementFormat, multiplier: float, table: Tensor | None, search: str
) -> Iterator[Tensor]:
    largest = g.abs().amax(-1)
    if form.scale == "e8m0":
        # frexp gives a mantissa in [0.5, 1), so floor(log2) is one less; a group of zeros gets 2^0.
        exponent = torch.frexp(largest).exponent - 1 - form.largest_exponent
        exponent = torch.where(largest > 0, exponent, 0)
        for offset in _EXPONENTS if search == "mse" else (0,):
            yield ((exponent + offset).clamp(-126, 127) + 127).to(torch.uint8)
        return
    end = float(form.values(table).abs().max()) if form.is_table else form.largest
    scale = largest / end
    for factor in _SHRINK if search == "mse" else (1.0,):
        if form.scale == "e4m3":
            yield encode(scale * factor / multiplier, FORMATS["e4m3"])
        else:
            yield scale * factor
