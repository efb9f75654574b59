"""Cross-layer equalization (Nagel et al., arXiv 1906.04721): from weights alone, no data.

    s_j = sqrt(r_w,j / r_x,j)  up to its inverse:   s_j = sqrt(r_out,j / r_in,j)

For a value x_j = sum_i V_ji u_i that a linear V writes and layers W read, r_out,j = max_i |V_ji| is the range of the
writer's row and r_in,j = max |W_nj| that of the readers' column. Dividing the row and multiplying the column by
s_j makes the two equal, so neither has a channel that others' codes are wasted on. It is exact where x/s can
be folded into V: nothing, or operators that pass positive scales (ReLU), may stand between.
The writer is given by who knows the graph; without one (`writer` None) only the readers' columns are evened,

    s_j = 1 / r_in,j,   normalized to a geometric mean of 1,

which is SmoothQuant's formula at alpha = 0.
"""

from __future__ import annotations

from torch import Tensor

from .choose_smoothquant import normalized
from .sites import EdgeTransform, Site


def choose_equalization(site: Site, writer: Tensor | None = None) -> EdgeTransform:
    """The scale for a site whose value is written by a linear with weight `writer [K, ...]`, if there is one.

    Channels that either side leaves at 0 keep a scale of 1.
    """
    reads = site.weight_maximum()
    writes = reads.new_ones(reads.shape) if writer is None else writer.double().abs().flatten(1).amax(1)
    dead = (reads == 0) | (writes == 0)
    reads, writes = reads.masked_fill(dead, 1.0), writes.masked_fill(dead, 1.0)
    scale = (writes / reads).sqrt() if writer is not None else 1 / reads
    scale[~dead] = normalized(scale[~dead]) if bool((~dead).any()) else scale[~dead]
    return EdgeTransform(scale)
