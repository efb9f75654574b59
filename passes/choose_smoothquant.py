"""SmoothQuant (Xiao et al., arXiv 2211.10438): part of the activations' spread is moved into the weights.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

with the maximum of the weights over all readers of the value. alpha = 1 evens all activation channels, 0 evens
the weights' columns. Without a given alpha, the one of a grid whose error at the readers is least, which
may be none at all (s = 1). s is normalized to a geometric mean of 1, which changes nothing over the reals and
keeps numbers in their range. Channels that are always 0 on either side keep s at the clamp.
"""

from __future__ import annotations

import torch

from .site_error import Error, best_exponent
from .site_statistics import SiteStatistics
from .sites import EdgeTransform, Site


def smoothquant_scale(site: Site, statistics: SiteStatistics, alpha: float) -> torch.Tensor:
    """s of the formula, float64 `[K]`."""
    x = statistics.largest.clamp(min=1e-5)
    w = site.weight_maximum().clamp(min=1e-5)
    return normalized((x**alpha / w ** (1 - alpha)).clamp(min=1e-5))


def normalized(scale: torch.Tensor) -> torch.Tensor:
    """The scale with a geometric mean of 1."""
    return scale / scale.log().mean().exp()


def choose_smoothquant(
    site: Site, statistics: SiteStatistics, error: Error, alpha: float | None = None
) -> EdgeTransform:
    """The scale for `alpha`, or for the best of the grid where it is None."""
    if alpha is not None:
        return EdgeTransform(smoothquant_scale(site, statistics, alpha))
    return best_exponent(lambda a: EdgeTransform(smoothquant_scale(site, statistics, a)), error)
