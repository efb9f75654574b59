"""Mixtures of experts: linears whose rows choose their matrix, what chooses, and rows that are put in other places.

==================================  =====================================  ===================  ====================
operator                            T                                      log-scale            shift
==================================  =====================================  ===================  ====================
y[s] = W[e[s]] x[s] + b[e[s]]       T_x and T_y any, one for all experts:  W absorbs s_x, s_y   b absorbs z_x, and
                                    W'[e] = T_y W[e] T_x^-1                                     z_y if e is in range
y = z, y[i[s]] += x[s] (or = x[s])  rows: none; T_y = T_z = T_x            s_y = s_z = s_x      sums: none; places:
                                                                                                z_y = z_z = z_x
0                                   any                                    any                  none
topk, sort                          none                                   none                 none
==================================  =====================================  ===================  ====================

Every expert's matrix and bias take the same T: what lies before and behind are rows of one value. Between two
linears whose rows choose by the same e, scales may differ from expert to expert: there the values carry the index of
e (`Analysis.chosen`), although none of their dimensions has it. A row whose e is no expert is 0, scaled or
turned but not shifted; what topk, sort and argmax find among E entries is in range.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...dialect import linear_grouped
from ...dialect.gated import gated
from ...graph import argument, value
from ..analysis import ROW_BY_ROW, Absorber, Analysis, rule, tensors
from ..atoms import Group, flipped
from ..potentials import Key
from .elementwise import FUNCTIONS

aten = torch.ops.aten

ROW_BY_ROW.update(FUNCTIONS)
ROW_BY_ROW.update(
    (
        gated.overload, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
        aten.relu.default, aten.leaky_relu.default, aten.abs.default, aten._to_copy.default, aten.clone.default,
        aten.dropout.default, aten.slice.Tensor, aten.narrow.default, aten.cat.default,
    )
)  # fmt: skip

_RANKINGS = (
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.argmax.default, aten.argmin.default,
    aten.argsort.default,
)  # fmt: skip
_VIEWS = (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.expand.default, aten.squeeze.dim,
    aten.slice.Tensor, aten.select.int, aten.flatten.using_ints, aten.clone.default, aten.transpose.int,
)  # fmt: skip


@rule(linear_grouped.overload)
def grouped_linear(analysis: Analysis, node: fx.Node) -> None:
    """As a linear, on both sides, with one T for all experts."""
    x, expert, weight, bias = (argument(node, name) for name in ("input", "expert", "weight", "bias"))
    constants = [c for c in (weight, bias) if c is not None]
    analysis.allow(node, analysis.dims(expert), Group.NONE, "ids")
    rows, given = analysis.dims(weight), analysis.dims(x)
    # Where rows go is not known here: they keep their order.
    analysis.allow(
        node, [given[0], *(analysis.dims(c)[0] for c in constants)], Group.NONE, "rows choose experts"
    )
    analysis.tie(node, given[-1], flipped(rows[2]))
    analysis.dims_of[node] = [given[0], rows[1]]
    if bias is not None:
        analysis.tie(node, analysis.dims(bias)[1], rows[1])
    if not all(analysis.is_parameter(c) for c in constants):
        for at in (x, *constants, node):
            analysis.pin_scale(node, at, "experts that are computed")
            analysis.pin_shift(node, at, "experts that are computed")
        return
    chosen = analysis.chooser(expert, value(weight).shape[0])
    own = [c for c in constants if _read_by(analysis, c, expert)]
    for constant in own:
        analysis.tie(node, analysis.dims(constant)[0], chosen)
    if weight in own:
        analysis.stacked.add(analysis.constant(weight))
    if len(own) == len(constants):
        analysis.carried[node] = chosen
    analysis.scales.tie((1, analysis.key(x)), (1, analysis.key(weight, 2)))
    analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(weight, 1)))
    if bias is not None:
        analysis.scales.equal(analysis.key(node), analysis.key(bias))
    _absorb_shift(analysis, node, x, weight, bias)


def _read_by(analysis: Analysis, constant: fx.Node, expert: fx.Node) -> bool:
    """Whether a constant is read by grouped linears alone, all with one choice of experts."""
    reads = (n for n in analysis.program.graph.nodes if n.op == "get_attr" and n.target == constant.target)
    users = [user for node in reads for user in node.users]
    return all(u.target is linear_grouped.overload and argument(u, "expert") is expert for u in users)


def _absorb_shift(
    analysis: Analysis, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> None:
    """b'[e] = b[e] - W[e] z_x + z_y, with vectors of the channels alone."""
    held = analysis.constant(weight)
    own = analysis.is_own_bias(bias)
    in_range = _in_range(argument(node, "expert"), value(weight).shape[0])
    analysis.absorbers.append(Absorber(node, held, bias, Key(held, 2, node), Key(held, 1, node), 1))
    analysis.shifts.equal(analysis.key(x), Key(held, 2, node))
    analysis.shifts.equal(analysis.key(node), Key(held, 1, node))
    if not own:
        analysis.pin_shift(node, x, "its bias is the bias of another operator too")
    if not own or not in_range:
        why = "rows without an expert are 0" if own else "its bias is the bias of another operator too"
        analysis.pin_shift(node, node, why)


def _in_range(expert: fx.Node, count: object) -> bool:
    """Whether the ids are known to be in 0..count - 1: places among as many entries, through views."""
    while expert.target in _VIEWS:
        expert = expert.args[0]  # type: ignore[assignment]  # the operand of a view is a node
    if expert.target is operator.getitem and expert.args[1] == 1:
        expert = expert.args[0]  # type: ignore[assignment]
    if expert.target not in _RANKINGS:
        return False
    ranked, dim = expert.args[0], argument(expert, "dim")
    return isinstance(ranked, fx.Node) and dim is not None and bool(value(ranked).shape[dim] == count)


@rule(aten.index_add.default, aten.index_copy.default, aten.index_put.default)
def put_rows(analysis: Analysis, node: fx.Node) -> None:
    """Rows of one value are added to, or replace, rows of another that ids choose."""
    z = argument(node, "self")
    if node.target == aten.index_put.default:
        indices, x, dim = argument(node, "indices"), argument(node, "values"), 0
        sums = bool(argument(node, "accumulate"))
        known = len(indices) == 1 and isinstance(indices[0], fx.Node) and len(value(indices[0]).shape) == 1
    else:
        x, dim, sums = (
            argument(node, "source"),
            int(argument(node, "dim")),
            node.target == aten.index_add.default,
        )
        known = not sums or argument(node, "alpha") == 1
    rank = len(value(node).shape)
    if not known or len(value(x).shape) != rank:
        for at in (*tensors(node), node):
            analysis.pin(node, at, "rows are put by several ids, or with a factor")
        return
    for operand in tensors(node):
        if operand not in (z, x):
            analysis.pin(node, operand, "ids")
    dims, added = list(analysis.dims(z)), analysis.dims(x)
    analysis.dims_of[node] = dims
    for index in range(rank):
        if index == dim % rank:
            analysis.allow(node, [dims[index], added[index]], Group.NONE, "rows are put where ids say")
        else:
            analysis.tie(node, dims[index], added[index])
    for operand in (z, x):
        analysis.same_scale(node, operand)
        if sums:
            analysis.pin_shift(node, operand, "a sum of rows")
        else:
            analysis.same_shift(node, operand)
    if sums:
        analysis.pin_shift(node, node, "a sum of rows")


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(analysis: Analysis, node: fx.Node) -> None:
    """Zero in every basis."""
    analysis.dims_of[node] = analysis.fresh(node)
    analysis.pin_shift(node, node, "zeros")


@rule(aten.topk.default, aten.sort.default, aten.sort.stable)
def ranking(analysis: Analysis, node: fx.Node) -> None:
    """What is ranked keeps its values, so that the same entries win."""
    for operand in tensors(node):
        analysis.pin(node, operand, "its entries are ranked")
