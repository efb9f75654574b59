"""AWQ (Lin et al., arXiv 2306.00978): columns of the weight that large activations meet get finer codes.

    s_j = mean|x_j|^alpha, divided by sqrt(max s * min s);   alpha in {0, 1/20, ..., 1}

The alpha of the least output error with weights rounded in the recipe's format wins. As published the activations
stay in float; where the recipe rounds them too, that rounding is part of the error that is compared. The mean
magnitude is taken over the sample of rows.
"""

from __future__ import annotations

import torch

from .site_error import Error, best_exponent
from .site_statistics import SiteStatistics
from .sites import EdgeTransform, Site


def mean_magnitude(site: Site, statistics: SiteStatistics) -> torch.Tensor:
    """mean |x_j| over the sample, float64 `[K]`."""
    rows = [x.movedim(site.channel_dim, -1).reshape(-1, site.channels) for x in statistics.sample]
    return torch.cat(rows).double().abs().mean(0)


def choose_awq(site: Site, statistics: SiteStatistics, error: Error) -> EdgeTransform:
    """The scale of the best alpha (0: none)."""
    magnitude = mean_magnitude(site, statistics).clamp(min=1e-5)

    def scaled(alpha: float) -> EdgeTransform:
        scale = (magnitude**alpha).clamp(min=1e-4)
        return EdgeTransform(scale / (scale.max() * scale.min()).sqrt())

    return best_exponent(scaled, error)
