"""Attention, rotary embedding and softmax.

=========  ==================================================  =====================  ===============
operator   T                                                   log-scale              shift
=========  ==================================================  =====================  ===============
attention  head dimension: T_q = T_k^-t; values: T_y = T_v,    s_q = -s_k, s_y =      z_y = z_v, z_k
           one for each key/value head; heads: permutations,   s_v; for each          any, z_q = 0
           groups of queries together                          key/value head
rotary     each pair of channels: a complex number (rotation   equal inside a pair    none
           and scale)
softmax    permutations                                        none                   none
=========  ==================================================  =====================  ===============

z_y = z_v because the weights of a row sum to one: there is no sink term in this operator, and every query is taken to
see some key (one that sees none gets no average, in any runtime). Keys may be shifted because the same number is added
to all scores of a query. A pair turns by one angle only if the tables have equal columns for its two channels, which is
proved on the graph or on the constant.
"""

from __future__ import annotations

import torch
from torch import fx

from ...dialect.rotary import rotary
from ...graph import argument, value
from ..analysis import Analysis, rule, tensors
from ..atoms import Group, cut_out, flatten, flipped, new

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(analysis: Analysis, node: fx.Node) -> None:
    """q `[..., H, S, D]`, k `[..., G, T, D]`, v `[..., G, T, V]`."""
    q, k, v, mask = (argument(node, name) for name in ("query", "key", "value", "attn_mask"))
    queries, keys, values = analysis.dims(q), analysis.dims(k), analysis.dims(v)
    analysis.tie(node, queries[-1], flipped(keys[-1]))
    for at in range(len(queries) - 2):
        ours, theirs = value(q).shape[at], value(k).shape[at]
        analysis.tie(node, keys[at], values[at])
        if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
            copies = new(ours // theirs)
            # Query head h reads key head h // copies.
            analysis.tie(node, queries[at], (*(keys[at] or ()), *copies))
            analysis.allow(node, [copies], Group.PERMUTATION, "attention: heads")
        else:
            analysis.tie(node, queries[at], keys[at])
        analysis.allow(node, [queries[at], keys[at]], Group.PERMUTATION, "attention: each head by itself")
    analysis.allow(node, [queries[-2]], Group.PERMUTATION, "attention: each query by itself")
    analysis.allow(node, [keys[-2]], Group.PERMUTATION, "attention: softmax over the keys")
    analysis.tie(node, keys[-2], values[-2])
    analysis.dims_of[node] = [*queries[:-1], values[-1]]
    analysis.scales.tie((1, analysis.key(q)), (1, analysis.key(k)))
    analysis.same_scale(node, v)
    analysis.pin_shift(node, q, "attention: a shifted query changes the scores")
    analysis.same_shift(node, v)
    if mask is not None:
        _mask(analysis, node, mask)


def _mask(analysis: Analysis, node: fx.Node, mask: fx.Node) -> None:
    """Broadcast to `[..., H, S, T]`: permuted with heads, queries and keys, never scaled or shifted."""
    queries, keys = analysis.dims(argument(node, "query")), analysis.dims(argument(node, "key"))
    scores = [*queries[:-1], keys[-2]]
    sizes = [*value(argument(node, "query")).shape[:-1], value(argument(node, "key")).shape[-2]]
    given = analysis.dims(mask)
    for index, dim in enumerate(given):
        at = index - len(given)
        if str(value(mask).shape[index]) == str(sizes[at]):
            analysis.tie(node, dim, scores[at])
    analysis.allow(node, given, Group.PERMUTATION, "attention: a mask or bias of scores")
    analysis.pin_scale(node, mask, "attention: a mask or bias of scores")
    analysis.pin_shift(node, mask, "attention: a mask or bias of scores")


@rule(rotary.overload)
def rotate(analysis: Analysis, node: fx.Node) -> None:
    """The first R channels of the chosen heads turn in pairs; the rest is copied."""
    x, cos, sin = (argument(node, name) for name in ("x", "cos", "sin"))
    heads, interleaved = argument(node, "heads"), argument(node, "interleaved")
    for table in (cos, sin):
        analysis.pin(node, table, "rotary: the table of angles")
    dims = list(analysis.dims(x))
    analysis.dims_of[node] = dims
    turned = value(cos).shape[-1]
    whole = dims[-1]
    part = cut_out(whole, 0, turned) if whole is not None and isinstance(turned, int) else None
    proved = all(_pairs_are_equal(analysis, table, bool(interleaved)) for table in (cos, sin))
    turning = [ref for ref in flatten(part or ()) if ref[0].size > 1]
    if part is None or not proved or heads != -1 or len(turning) != 1:
        why = "rotary whose pairs are not proved to turn by one angle"
        analysis.allow(node, dims, Group.NONE, why)
        analysis.pin_scale(node, x, why)
        analysis.pin_scale(node, node, why)
    else:
        atom, _ = turning[0]
        layouts = {atom.interleaved, bool(interleaved)} - {None}
        atom.interleaved = bool(interleaved)
        group = Group.PAIR if len(layouts) == 1 else Group.NONE
        analysis.allow(node, [part], group, "rotary: each pair of channels by itself")
        analysis.same_scale(node, x)
    # Positions turn differently; heads are beside the channels and all turn alike.
    analysis.allow(node, dims[:-1], Group.PERMUTATION, "rotary: each head by itself")
    analysis.same_shift(node, x)
    for side in (x, node):
        analysis.pin_shift(node, side, "rotary: a shift would turn with the position", only=part)


_COLUMN_BY_COLUMN = (
    aten.cos.default, aten.sin.default, aten.neg.default, aten._to_copy.default, aten.to.dtype, aten.clone.default,
    aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.index.Tensor, aten.reshape.default,
    aten.embedding.default, aten.index_select.default, aten.mul.Tensor, aten.select.int, aten.squeeze.dim,
)  # fmt: skip


def _pairs_are_equal(analysis: Analysis, table: fx.Node, interleaved: bool) -> bool:
    """Whether the columns of each pair are the same, whatever the inputs."""
    if table.op == "get_attr":
        held = analysis.program.tensors[str(table.target)]
        pairs = held.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        return bool(
            (pairs.select(-1 if interleaved else -2, 0) == pairs.select(-1 if interleaved else -2, 1)).all()
        )
    if table.op != "call_function":
        return False
    if table.target == aten.cat.default:
        parts, dim = argument(table, "tensors"), argument(table, "dim")
        last = dim in (-1, len(value(table).shape) - 1)
        return last and not interleaved and len(parts) == 2 and parts[0] is parts[1]
    if table.target == aten.repeat_interleave.self_int:
        dim = argument(table, "dim")
        return (
            interleaved and dim in (-1, len(value(table).shape) - 1) and argument(table, "repeats") % 2 == 0
        )
    if table.target not in _COLUMN_BY_COLUMN:
        return False
    if table.target == aten.reshape.default and _stacked(table) is not None:
        stack = _stacked(table)
        return interleaved and stack is not None and stack[0] is stack[1]
    wide = [x for x in tensors(table) if value(x).shape and value(x).shape[-1] == value(table).shape[-1]]
    kept = all(_keeps_last(table, x) for x in wide)
    return bool(wide) and kept and all(_pairs_are_equal(analysis, x, interleaved) for x in wide)


def _keeps_last(node: fx.Node, x: fx.Node) -> bool:
    """Whether the last dimension of x is the last of the node, index by index."""
    if node.target in (aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.index_select.default):
        return argument(node, "dim") not in (-1, len(value(x).shape) - 1)
    if node.target == aten.unsqueeze.default:
        return argument(node, "dim") not in (-1, len(value(node).shape) - 1)
    if node.target == aten.index.Tensor:
        return len(argument(node, "indices")) < len(value(x).shape)
    return not (node.target == aten.embedding.default and x is not argument(node, "weight"))


def _stacked(node: fx.Node) -> list[fx.Node] | None:
    """The two tables that a reshape of a stack interleaves."""
    x = argument(node, "self")
    if not isinstance(x, fx.Node) or x.target != aten.stack.default:
        return None
    parts = argument(x, "tensors")
    last = argument(x, "dim") in (-1, len(value(x).shape) - 1)
    return list(parts) if last and len(parts) == 2 else None


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(analysis: Analysis, node: fx.Node) -> None:
    """Only permutations commute."""
    x = tensors(node)[0]
    analysis.dims_of[node] = list(analysis.dims(x))
    analysis.allow(node, analysis.dims(node), Group.PERMUTATION, "softmax: only permutations commute")
    for side in (x, node):
        analysis.pin_scale(node, side, "softmax")
        analysis.pin_shift(node, side, "softmax")
