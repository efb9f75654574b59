"""Sums, products and functions of single values.

============================  ====================================  =====================  =======================
y = f(x...)                   T                                     log-scale              shift
============================  ====================================  =====================  =======================
a + b                         T_y = T_a = T_b                       s_y = s_a = s_b        z_y = z_a + z_b
a - b                         the same                              the same               z_y = z_a - z_b
a * b, shared dimension       permutations                          s_y = s_a + s_b        none
a * b, only in a              T_y = T_a                             s_y = s_a              none
x * gain                      all, once the gain is folded to one   s_y = s_x + s_gain     none
c x                           T_y = T_x                             s_y = s_x              none
-x, casts, dropout            T_y = T_x                             s_y = s_x              none (casts: z_y = z_x)
relu, leaky relu, abs         permutations                          s_y = s_x              none
any other function            permutations                          none                   none
============================  ====================================  =====================  =======================

A dimension that an operand of a sum does not have (broadcasting) takes permutations and no scale.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...dialect.gated import gated
from ...graph import argument, value
from ..analysis import Analysis, Gain, rule, tensors
from ..atoms import Dim, Group

aten = torch.ops.aten


def broadcast(
    analysis: Analysis,
    node: fx.Node,
    operands: list[fx.Node],
    shared: str | None = None,
    lacking: str | None = None,
) -> None:
    """Tie every operand's dimensions to those of the result.

    shared, lacking: why a dimension takes no more than permutations where several operands have it, or where one lacks
    it.
    """
    dims = analysis.fresh(node)
    for index in range(len(dims)):
        having: list[Dim] = []
        for operand in operands:
            given = analysis.dims(operand)
            at = index - len(dims) + len(given)
            if at >= 0 and size(operand, at) == size(node, index):
                having.append(given[at])
        for dim in having:
            analysis.tie(node, dims[index], dim)
        if shared is not None and len(having) > 1:
            analysis.allow(node, [dims[index]], Group.PERMUTATION, shared)
        if lacking is not None and len(having) < len(operands):
            analysis.allow(node, [dims[index]], Group.PERMUTATION, lacking)
    analysis.dims_of[node] = dims


def size(node: fx.Node, dim: int) -> int | str:
    """A size that compares without a guard: symbolic ones as text."""
    found = value(node).shape[dim]
    return found if isinstance(found, int) else str(found)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Tensor arguments in order, one for each position (x * x has two)."""
    return [a for a in node.args[:2] if isinstance(a, fx.Node) and hasattr(value(a), "shape")]


def _number(node: fx.Node, name: str = "alpha") -> bool:
    return argument(node, name) == 1


@rule(aten.add.Tensor, aten.sub.Tensor)
def add(analysis: Analysis, node: fx.Node) -> None:
    """Sum or difference."""
    operands = _operands(node)
    if len(operands) < 2:
        _with_number(analysis, node, operands[0])
        return
    broadcast(analysis, node, operands, lacking="a broadcast operand is added to all of it")
    if not _number(node):
        for x in (node, *operands):
            analysis.pin_scale(node, x, "a sum with a factor")
            analysis.pin_shift(node, x, "a sum with a factor")
        return
    for x in operands:
        analysis.same_scale(node, x)
    sign = -1 if node.target == aten.sub.Tensor else 1
    first, second = (analysis.key(x) for x in operands)
    if first == second:
        analysis.pin_shift(node, operands[0], "it is added to itself")
        analysis.pin_shift(node, node, "something is added to itself")
        return
    analysis.shifts.tie((1, analysis.key(node)), (-1, first), (-sign, second))


def _with_number(analysis: Analysis, node: fx.Node, x: fx.Node) -> None:
    analysis.dims_of[node] = list(analysis.dims(x))
    analysis.allow(node, analysis.dims(node), Group.PERMUTATION, "a number is added to all of it")
    analysis.pin_scale(node, x, "a number is added")
    analysis.pin_scale(node, node, "a number is added")
    analysis.same_shift(node, x)


@rule(aten.mul.Tensor, aten.div.Tensor)
def multiply(analysis: Analysis, node: fx.Node) -> None:
    """Product or quotient."""
    operands = _operands(node)
    divided = node.target == aten.div.Tensor
    if len(operands) == 1 and operands[0] is node.args[0]:
        linear_map(analysis, node, operands[0])
        return
    if len(operands) < 2:
        function(analysis, node)
        return
    gain = _gain(analysis, node, operands, divided)
    # What only one side has passes; what both have takes permutations, unless one side is a gain that can become one.
    broadcast(analysis, node, operands, shared=None if gain else "a product: only permutations commute")
    if gain is not None:
        analysis.gains.append(gain)
    for x in (*operands, node):
        analysis.pin_shift(node, x, "a product")
    channels = [
        analysis.key(x) for x in operands if (gain and x is gain.parameter) or not _narrow(analysis, node, x)
    ]
    for x in operands:
        if analysis.key(x) not in channels:
            analysis.pin_scale(node, x, "a factor for each row")
    if not channels:
        analysis.pin_scale(node, node, "factors for each row")
    elif len(channels) == 2 and channels[0] == channels[1]:
        for x in (operands[0], node):
            analysis.pin_scale(node, x, "a square")
    else:
        signs = [-1 if divided and key == analysis.key(operands[1]) else 1 for key in channels]
        analysis.scales.tie(
            (1, analysis.key(node)), *((-sign, key) for sign, key in zip(signs, channels, strict=True))
        )


def _narrow(analysis: Analysis, node: fx.Node, x: fx.Node) -> bool:
    """Whether an operand lacks a static dimension that the result has (a factor for each row)."""
    full, given = list(value(node).shape), [1] * len(value(node).shape)
    shape = list(value(x).shape)
    given[len(given) - len(shape) :] = shape
    return any(
        isinstance(f, int) and f > 1 and isinstance(g, int) and g == 1
        for f, g in zip(full, given, strict=True)
    )


def _gain(analysis: Analysis, node: fx.Node, operands: list[fx.Node], divided: bool) -> Gain | None:
    """A product with (or quotient by) a parameter that has channels in one dimension only, and x has all of its own."""
    first, second = operands
    rank = len(value(node).shape)
    for x, g in ((first, second), (second, first)):
        if (divided and g is first) or not analysis.is_parameter(g) or analysis.is_parameter(x):
            continue
        if len(value(x).shape) != rank:
            continue
        wide = [i for i, s in enumerate(value(g).shape) if s != 1]
        whole = all(size(x, i) == size(node, i) for i in range(rank))
        if whole and len(wide) == 1 and size(g, wide[0]) == size(node, wide[0] - len(value(g).shape)):
            return Gain(node, analysis.constant(g), x, norm=False)
    return None


def linear_map(analysis: Analysis, node: fx.Node, x: fx.Node, shift: bool = False) -> None:
    """y = c x for a number c: everything passes, shifts only where c is one."""
    analysis.dims_of[node] = list(analysis.dims(x))
    analysis.same_scale(node, x)
    if shift:
        analysis.same_shift(node, x)
    else:
        analysis.pin_shift(node, x, "a factor")
        analysis.pin_shift(node, node, "a factor")


@rule(aten.neg.default)
def negate(analysis: Analysis, node: fx.Node) -> None:
    """-x."""
    linear_map(analysis, node, tensors(node)[0])


@rule(
    aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.dropout.default, aten.contiguous.default,
    aten.to.dtype_layout, aten.alias.default,
)  # fmt: skip
def same(analysis: Analysis, node: fx.Node) -> None:
    """The same numbers, perhaps in another type."""
    x = tensors(node)[0]
    if not value(x).is_floating_point():
        analysis.pin(node, x, "it is not a number with a fraction")
        analysis.pin(node, node, "it comes from integers")
        return
    linear_map(analysis, node, x, shift=True)


@rule(aten.relu.default, aten.leaky_relu.default, aten.abs.default)
def positively_homogeneous(analysis: Analysis, node: fx.Node) -> None:
    """f(c x) = c f(x) for c > 0."""
    x = tensors(node)[0]
    analysis.dims_of[node] = list(analysis.dims(x))
    name = str(node.target).split(".")[1]
    analysis.allow(
        node, analysis.dims(node), Group.PERMUTATION, f"{name}: only permutations and positive scales commute"
    )
    analysis.same_scale(node, x)
    for at in (x, node):
        analysis.pin_shift(node, at, name)


FUNCTIONS = (
    aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.exp.default, aten.log.default,
    aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.softplus.default, aten.pow.Tensor_Scalar,
    aten.elu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.mish.default,
    aten.relu6.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.log1p.default, aten.expm1.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.square.default, aten.log_sigmoid.default,
    aten.rsub.Scalar, aten.maximum.default, aten.minimum.default, aten.masked_fill.Scalar, aten.where.self,
    aten.add.Scalar, aten.sub.Scalar,
)  # fmt: skip


@rule(*FUNCTIONS)
def function(analysis: Analysis, node: fx.Node) -> None:
    """Any function of single numbers: only permutations commute."""
    name = str(node.target).split(".")[1]
    operands = tensors(node)
    why = f"{name}: only permutations commute"
    broadcast(analysis, node, operands, shared=why)
    analysis.allow(node, analysis.dims(node), Group.PERMUTATION, why)
    for x in (*operands, node):
        analysis.pin_scale(node, x, name)
        analysis.pin_shift(node, x, name)


@rule(gated.overload)
def gated_product(analysis: Analysis, node: fx.Node) -> None:
    """activation(gate) * up: the gate is pinned by its activation, up scales the product."""
    gate, up, activation = (argument(node, name) for name in ("gate", "up", "activation"))
    why = f"{activation} and a product: only permutations commute"
    broadcast(analysis, node, [gate, up])
    analysis.allow(node, analysis.dims(node), Group.PERMUTATION, why)
    for x in (gate, up, node):
        analysis.pin_shift(node, x, "a product")
    if activation in ("relu", "none"):
        analysis.scales.tie((1, analysis.key(node)), (-1, analysis.key(gate)), (-1, analysis.key(up)))
        return
    analysis.pin_scale(node, gate, f"{activation} does not commute with scales")
    analysis.same_scale(node, up)


@rule(operator.getitem)
def item(analysis: Analysis, node: fx.Node) -> None:
    """One result of an operator that has several: a rule for that operator would be needed."""
    analysis.pin(node, node, f"one of several results of {node.args[0]}")
