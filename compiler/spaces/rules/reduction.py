"""Reductions and scans over a dimension: that dimension is pinned, the others pass what each index by itself allows.

==============  =======================================  ==================  ==================
operator        other dimensions                         log-scale           shift
==============  =======================================  ==================  ==================
mean            any                                      s_y = s_x           z_y = z_x
sum, cumsum     any                                      s_y = s_x           none
amax, amin      permutations                             s_y = s_x           z_y = z_x
==============  =======================================  ==================  ==================

The vectors of what is reduced do not depend on the reduced index, as the result has none.
"""

from __future__ import annotations

import torch
from torch import fx

from ...graph import argument
from ..analysis import Analysis, rule
from ..atoms import Dim, Group

aten = torch.ops.aten


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduce(analysis: Analysis, node: fx.Node) -> None:
    """Over one or several dimensions."""
    x = argument(node, "self")
    given = analysis.dims(x)
    over = argument(node, "dim")
    over = (
        list(range(len(given)))
        if over is None or over == []
        else ([over] if isinstance(over, int) else list(over))
    )
    over = [d % len(given) for d in over]
    name = str(node.target).split(".")[1]
    analysis.allow(node, [given[d] for d in over], Group.NONE, f"{name} over it")
    keep = bool(argument(node, "keepdim"))
    dims: list[Dim] = []
    for index, dim in enumerate(given):
        if index not in over:
            dims.append(dim)
        elif keep:
            dims.append(())
    analysis.dims_of[node] = dims
    if name in ("amax", "amin"):
        analysis.allow(node, dims, Group.PERMUTATION, f"{name}: each index by itself")
    analysis.same_scale(node, x)
    if name == "sum":
        for side in (x, node):
            analysis.pin_shift(node, side, "a sum")
    else:
        analysis.same_shift(node, x)


@rule(aten.cumsum.default, aten.flip.default)
def scan(analysis: Analysis, node: fx.Node) -> None:
    """Along dimensions that are pinned."""
    x = argument(node, "self")
    given = analysis.dims(x)
    over = argument(node, "dims" if node.target == aten.flip.default else "dim")
    over = [over] if isinstance(over, int) else list(over)
    analysis.dims_of[node] = list(given)
    name = str(node.target).split(".")[1]
    analysis.allow(node, [given[d] for d in over], Group.NONE, f"{name} along it")
    analysis.same_scale(node, x)
    for side in (x, node):
        analysis.pin_shift(node, side, name)
