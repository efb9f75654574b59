"""Linears, embeddings and products of matrices.

=====================  ===============================================  ===================  ==================
operator               T                                                log-scale            shift
=====================  ===============================================  ===================  ==================
y = x W^T + b          T_x and T_y any: W' = T_y W T_x^-1, b' = T_y b   W absorbs s_x, s_y   b absorbs z_x, z_y
y = E[ids]             T_y any: E' = E T_y^T                            E absorbs s_y        E absorbs z_y
y = a b (activations)  contracted dimensions contravariant,             none                 none
                       batch: permutations
=====================  ===============================================  ===================  ==================
"""

from __future__ import annotations

import torch
from torch import fx

from ...graph import argument, value
from ..analysis import Absorber, Analysis, rule, tensors
from ..atoms import Group, flipped
from ..potentials import Key

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(analysis: Analysis, node: fx.Node) -> None:
    """The operator that absorbs everything."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    if not analysis.is_parameter(weight) or (bias is not None and not analysis.is_parameter(bias)):
        _computed_linear(analysis, node)
        return
    rows, columns = analysis.dims(weight)
    given = analysis.dims(x)
    analysis.tie(node, given[-1], flipped(columns))
    analysis.dims_of[node] = [*given[:-1], rows]
    analysis.scales.tie((1, analysis.key(x)), (1, analysis.key(weight, 1)))
    analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(weight, 0)))
    absorb_shift(analysis, node, x, weight, bias)
    if bias is not None:
        analysis.tie(node, analysis.dims(bias)[0], rows)
        analysis.scales.equal(analysis.key(node), analysis.key(bias))
        analysis.allow(node, given[:-1], Group.PERMUTATION, "a bias is added to all of it")


def absorb_shift(
    analysis: Analysis, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> None:
    """b' = b - W z_x + z_y: legal with one bias for each use; where there is none, the fold adds one.

    The vectors are functions of the channels alone, so both are tied to a dimension of the weight.
    """
    own = analysis.is_own_bias(bias)
    # One vector for each use: two readers of one weight may be shifted differently.
    held = analysis.constant(weight)
    absorber = Absorber(node, held, bias, Key(held, 1, node), Key(held, 0, node), 0)
    analysis.shifts.equal(analysis.key(x), Key(held, 1, node))
    analysis.shifts.equal(analysis.key(node), Key(held, 0, node))
    analysis.absorbers.append(absorber)
    if not own:
        for at in (x, node):
            analysis.pin_shift(node, at, "its bias is the bias of another operator too")


def _computed_linear(analysis: Analysis, node: fx.Node) -> None:
    """The weight is computed in the graph: a contraction of two activations."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    rows, columns = analysis.dims(weight)
    given = analysis.dims(x)
    analysis.tie(node, given[-1], flipped(columns))
    analysis.dims_of[node] = [*given[:-1], rows]
    if bias is not None:
        analysis.tie(node, analysis.dims(bias)[0], rows)
        analysis.allow(node, given[:-1], Group.PERMUTATION, "a bias is added to all of it")
    for at in (x, weight, bias, node):
        if at is not None:
            analysis.pin_scale(node, at, "a product of two activations")
            analysis.pin_shift(node, at, "a product of two activations")


@rule(aten.embedding.default)
def embedding(analysis: Analysis, node: fx.Node) -> None:
    """Rows of a table; the rows themselves cannot be mixed."""
    weight, ids = argument(node, "weight"), argument(node, "indices")
    rows, columns = analysis.dims(weight)
    analysis.allow(node, [rows], Group.NONE, "rows are chosen by ids")
    analysis.allow(node, analysis.dims(ids), Group.NONE, "ids")
    analysis.dims_of[node] = [*analysis.dims(ids), columns]
    if not analysis.is_parameter(weight):
        for at in (weight, node):
            analysis.pin_scale(node, at, "the table is computed")
            analysis.pin_shift(node, at, "the table is computed")
        return
    analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(weight, 1)))
    # The table absorbs the shift when nothing but lookups reads it; all of them are shifted by one vector.
    if any(not _looks_up(user, weight) for user in _readers(analysis, weight)):
        analysis.pin_shift(node, node, "the table is read elsewhere too")
    else:
        analysis.shifts.tie((1, analysis.key(node)), (-1, analysis.key(weight, 1)))


def _readers(analysis: Analysis, constant: fx.Node) -> list[fx.Node]:
    """The calls that read a parameter, through whichever node."""
    reads = (n for n in analysis.program.graph.nodes if n.op == "get_attr" and n.target == constant.target)
    return [user for node in reads for user in node.users]


def _looks_up(node: fx.Node, table: fx.Node) -> bool:
    return node.target is aten.embedding.default and argument(node, "weight").target == table.target


@rule(aten.matmul.default, aten.bmm.default)
def matmul(analysis: Analysis, node: fx.Node) -> None:
    """A product of two activations: what is contracted is contravariant, batch dimensions are permuted together."""
    a, b = tensors(node)[0], tensors(node)[-1]
    left, right = analysis.dims(a), analysis.dims(b)
    if len(left) < 2 or len(right) < 2:
        for at in (a, b, node):
            analysis.pin(node, at, "a product with a vector")
        return
    analysis.tie(node, left[-1], flipped(right[-2]))
    batch = analysis.fresh(node)[:-2]
    for index in range(len(batch)):
        for operand, dims in ((a, left), (b, right)):
            place = index - len(batch) + len(dims) - 2
            if place >= 0 and value(operand).shape[place] == value(node).shape[index]:
                analysis.tie(node, batch[index], dims[place])
    analysis.allow(node, batch, Group.PERMUTATION, "a product of matrices for each index")
    analysis.dims_of[node] = [*batch, left[-2], right[-1]]
    for at in (a, b, node):
        analysis.pin_scale(node, at, "a product of two activations")
        analysis.pin_shift(node, at, "a product of two activations")
