"""QSUR, the quantization space utilization rate (OSTQuant, Hu et al., arXiv 2501.13987): how much of the cube that a
quantizer covers is filled by the data's ellipsoid.

    QSUR = V_X / side^d,   V_X = pi^(d/2) / Gamma(d/2 + 1) * c^(d/2) * sqrt(det S),   c = chi2_d(confidence)
    side = max_j (m_j + sqrt(c S_jj)) - min_j (m_j - sqrt(c S_jj))

for data of mean m and covariance S in d dimensions. sqrt(c S_jj) is the exact half-extent of the ellipsoid
{x: (x - m)^T S^-1 (x - m) <= c} along axis j; the paper takes end points of eigenvectors, which lie inside it.
Computed in logarithms; what is reported is QSUR^(1/d), which compares between widths. It is a measure for
reports, not what any method here minimizes.

Where the data does not span all dimensions the determinant is 0; eigenvalues below `FLOOR` of the mean one are
taken as that, so that before and after stay comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.hadamard import apply_hadamard

CONFIDENCE = 0.99
FLOOR = 1e-6


@dataclass(frozen=True)
class Moments:
    """Mean float64 `[d]` and covariance float64 `[d, d]` of a value's channels."""

    mean: Tensor
    covariance: Tensor

    def scaled(self, scale: Tensor | None = None, shift: Tensor | None = None) -> Moments:
        """Moments of `(x - shift) / scale`."""
        mean = self.mean if shift is None else self.mean - shift.double()
        if scale is None:
            return Moments(mean, self.covariance)
        r = 1 / scale.double()
        return Moments(mean * r, self.covariance * r * r[:, None])

    def rotated(self, matrix: Tensor) -> Moments:
        """Moments of `x @ matrix`."""
        m = matrix.double()
        return Moments(self.mean @ m, m.T @ self.covariance @ m)

    def hadamard(self, orders: Sequence[int]) -> Moments:
        """Moments of `x H` (`isofold::hadamard`)."""
        if not orders:
            return self
        half = apply_hadamard(self.covariance, orders)
        return Moments(apply_hadamard(self.mean[None], orders)[0], apply_hadamard(half.mT, orders))


def qsur_root(moments: Moments, confidence: float = CONFIDENCE) -> float:
    """QSUR^(1/d) of data with these moments; 0 for data that does not vary."""
    d = len(moments.mean)
    eigenvalues = torch.linalg.eigvalsh(moments.covariance)
    mean_eigenvalue = float(eigenvalues.mean())
    if mean_eigenvalue <= 0:
        return 0.0
    log_determinant = float(eigenvalues.clamp(min=FLOOR * mean_eigenvalue).log().sum())
    c = chi_square_quantile(d, confidence)
    extent = (c * moments.covariance.diagonal().clamp(min=0)).sqrt()
    side = float((moments.mean + extent).max() - (moments.mean - extent).min())
    log_volume = d / 2 * math.log(math.pi * c) - math.lgamma(d / 2 + 1) + log_determinant / 2
    return math.exp(log_volume / d - math.log(side))


def chi_square_quantile(degrees: int, confidence: float) -> float:
    """The value that a chi-square variable of `degrees` stays under with probability `confidence`, by bisection."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)

    def below(x: float) -> float:
        return float(torch.special.gammainc(half, torch.tensor(x / 2, dtype=torch.float64)))

    low, high = 0.0, 2.0 * degrees + 10.0
    while below(high) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < confidence else (low, middle)
    return (low + high) / 2
