"""Outlier Suppression+ (Wei et al., arXiv 2304.09145): shift channels to their middle, then shrink only outliers.

    z_j = (max x_j + min x_j) / 2
    s_j = max(1, max(x_j - z_j) / t, -min(x_j - z_j) / t)

for one target range t a site, searched from the largest magnitude down to 1 in max(100, amax / 0.5) steps
(fewer and geometric here: the error is flat between neighbours) by the output error with both sides rounded.
Channels within t are left as they are, so the weights pay only for the outliers.

The shift is kept only where it lowers that error. Where channels have a few large values on one side (behind a
GELU, massive activations) the middle of the range is far from where values lie, and each row of W then adds up
rounding errors times that offset: on MiniLM the shift everywhere costs more than it gains at every width.

A site that pads (convolutions) is scaled without a shift. The paper takes the error at the attention's output for
q, k and v; here it is the sum of the readers' own, which needs nothing but the site.
"""

from __future__ import annotations

import torch

from .site_error import Error
from .site_statistics import SiteStatistics
from .sites import EdgeTransform, Site

STEPS = 24


def osplus_shift(site: Site, statistics: SiteStatistics) -> torch.Tensor | None:
    """z float64 `[K]`, None where the site cannot be shifted."""
    return None if site.shift_refusal else (statistics.high + statistics.low) / 2


def osplus_scale(statistics: SiteStatistics, shift: torch.Tensor | None, target: float) -> torch.Tensor:
    """s float64 `[K]` for channels shifted by `shift` and a target range of -target..target."""
    z = torch.zeros_like(statistics.low) if shift is None else shift
    largest = torch.maximum(statistics.high - z, z - statistics.low)
    return (largest / target).clamp(min=1.0)


def choose_osplus(
    site: Site, statistics: SiteStatistics, error: Error, *, scale: bool = True, shift: bool = True
) -> EdgeTransform:
    """Shift and scale, or only one of them; each is left out where the error is less without it."""
    shifts = [None, osplus_shift(site, statistics)] if shift and not site.shift_refusal else [None]
    return min((t for z in shifts for t in _candidates(statistics, z, scale)), key=error)


def _candidates(statistics: SiteStatistics, z: torch.Tensor | None, scale: bool) -> list[EdgeTransform]:
    candidates = [EdgeTransform(None, z)]
    moved = torch.zeros_like(statistics.low) if z is None else z
    largest = torch.maximum(statistics.high - moved, moved - statistics.low)
    top = float(largest.max())
    if scale and top > 0:
        bottom = float(largest[largest > 0].min())
        for step in range(1, STEPS + 1):
            target = top * (bottom / top) ** (step / STEPS)
            candidates.append(EdgeTransform(osplus_scale(statistics, z, target), z))
    return candidates
