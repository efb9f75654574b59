"""Which weights of a row are kept beside its integer codes, and the rounding of the rest (EasyQuant, arXiv 2403.02775).

    W ~ scale (w - zero) + S,   S[n, k] = float16(W - scale (w - zero)) at the outliers of row n, else 0

Outliers of a row: the share `outliers` of its inputs with the largest |W - mean|, or all with |W - mean| >= n sigma
(`outlier_sigma`; at most MOST of a row). Ranges are searched (`ranges.py`) on what is left: outliers are 0 in that
search, and with zero points the mean of what else is in their group, so that they widen no range.

A share of each row costs less to store and to multiply than as many outliers anywhere in the matrix, because 16 rows
are stored side by side (`compiler/dialect/outlier_packing.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.dialect.outlier_packing import spread, storable_values
from ..compiler.dialect.packing import dequantize
from .ranges import QuantizedMatrix, quantize_matrix

MOST = 0.05
"""Share of a row that may be outliers: each takes 32 bits."""


@dataclass(frozen=True)
class Outliers:
    """places int32 and values float16 `[N, J]` (value 0: none); an entry is `value * multiplier`."""

    places: Tensor
    values: Tensor
    multiplier: float

    def dense(self, k: int) -> Tensor:
        """S, float32 `[N, k]`."""
        return spread(self.places, self.values, self.multiplier, k, torch.float32)

    @property
    def count(self) -> int:
        """Entries that are not zero."""
        return int((self.values != 0).sum())


def wants_outliers(form: Any) -> bool:
    """Whether a weight format keeps outliers."""
    return bool(getattr(form, "outliers", 0)) or getattr(form, "outlier_sigma", None) is not None


def most_outliers(form: Any, k: int) -> int:
    """The largest number of outliers in a row of k inputs."""
    if form.outlier_sigma is not None:
        return max(1, math.floor(MOST * k))
    return max(1, round(form.outliers * k))


def quantize_with_outliers(
    weight: Tensor, form: Any, group_size: int, *, storable: bool = True
) -> tuple[QuantizedMatrix, Outliers]:
    """Codes of `weight` float `[N, K]` in the format, and its outliers. The error is that of both together."""
    matrix = weight.detach().float()
    places, chosen = _places(matrix, form)
    there = torch.zeros(matrix.shape, dtype=torch.bool).scatter_(1, places, chosen)
    rest = _filled(matrix, there, group_size, form.symmetric)
    found = quantize_matrix(
        rest,
        bits=form.bits,
        group_size=group_size,
        symmetric=form.symmetric,
        search=form.range,
        storable=storable,
    )
    left = matrix - dequantize(found.codes, found.scale, found.zero, group_size)
    values, multiplier = storable_values(left.gather(1, places).masked_fill_(~chosen, 0))
    outliers = Outliers(places.to(torch.int32), values, multiplier)
    size = float(matrix.norm())
    error = float((left - outliers.dense(matrix.shape[1])).norm()) / size if size else 0.0
    return QuantizedMatrix(found.codes, found.scale, found.zero, error), outliers


def _places(matrix: Tensor, form: Any) -> tuple[Tensor, Tensor]:
    """Places int64 `[N, J]`, and which of them are outliers."""
    distance = (matrix - matrix.mean(1, keepdim=True)).abs_()
    largest, places = distance.topk(most_outliers(form, matrix.shape[1]), dim=1)
    if form.outlier_sigma is None:
        return places, torch.ones_like(places, dtype=torch.bool)
    limit = form.outlier_sigma * matrix.std(1, correction=0, keepdim=True)
    chosen = (largest >= limit) & (largest > 0)
    widest = max(int(chosen.sum(1).max()), 1) if chosen.numel() else 1
    return places[:, :widest], chosen[:, :widest]


def _filled(matrix: Tensor, there: Tensor, group_size: int, symmetric: bool) -> Tensor:
    """The matrix with values in the outliers' places that do not matter to a range."""
    if symmetric:
        return matrix.masked_fill(there, 0)
    k = matrix.shape[1]
    size = group_size or k
    groups = [F.pad(t, (0, -k % size)).unflatten(1, (-1, size)) for t in (matrix, ~there)]
    inside = groups[0] * groups[1]
    mean = inside.sum(-1, keepdim=True) / groups[1].sum(-1, keepdim=True).clamp(min=1)
    fill = mean.expand(-1, -1, size).flatten(1)[:, :k]
    return torch.where(there, fill, matrix)
