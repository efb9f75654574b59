"""Bags of embeddings become lookups and a reduction.

    embedding_bag(W, ids, offsets)  →  reduce(embedding(W, ids.reshape(-1, L)), 1)     every bag has L ids
                                    →  one_hot(bag of each id)^T embedding(W, ids)      bags of any sizes

so that tables are read like those of any lookup (and packed), and no runtime loops over bags. The bag of an id is the
number of offsets up to its position, minus one.

Side conditions: only the reduced rows are read; no padding index. The largest of bags of several sizes is refused.
Exactness: real.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape
from ..passes import Guarantee, define_pass
from .match import aten, is_call, operands

_SUM, _MEAN, _MAX = 0, 1, 2


@define_pass(Guarantee.REAL)
def canonicalize_embedding_bags(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.embedding_bag.padding_idx, aten.embedding_bag.default):
        reason = _reason(node)
        if reason is not None:
            editor.refused(node, reason)
            continue
        length = _length(editor, node)
        if length is None and argument(node, "mode") == _MAX:
            editor.refused(node, "the largest rows of bags of several sizes have no form without a loop")
            continue
        reduced = _any_sizes(editor, node) if length is None else _even(editor, node, length)
        editor.applied(
            node, f"bags of {'any sizes' if length is None else length} are lookups and a reduction"
        )
        for user in list(node.users):
            editor.replace(user, reduced)
        if not node._erased:
            editor.erase(node)


def _reason(node: fx.Node) -> str | None:
    if any(user.target is not operator.getitem or operands(user)[1] != 0 for user in node.users):
        return "its counts or places of maxima are read, too"
    if node.target == aten.embedding_bag.padding_idx and (argument(node, "padding_idx") or -1) >= 0:
        return "a padding index is left out of the bags"
    return None


def _length(editor: Editor, node: fx.Node) -> int | None:
    """Ids in every bag, where that is one number."""
    offsets, ids = argument(node, "offsets"), argument(node, "indices")
    if argument(node, "include_last_offset"):
        return None
    if is_call(offsets, aten.arange.start_step) and operands(offsets)[0] == 0:
        step = operands(offsets)[2]
        return step if isinstance(step, int) else None
    held, count = editor.tensor(offsets), (shape(ids) or (None,))[0]
    if held is None or not held.numel() or not isinstance(count, int) or count % held.numel():
        return None
    length = count // held.numel()
    return length if held.tolist() == list(range(0, count, max(length, 1))) else None


def _even(editor: Editor, node: fx.Node, length: int) -> fx.Node:
    rows = _rows(editor, node, [-1, length])
    mode = argument(node, "mode")
    reduction = {_SUM: aten.sum.dim_IntList, _MEAN: aten.mean.dim, _MAX: aten.amax.default}[mode]
    return editor.call(reduction, rows, [1], like=node)


def _rows(editor: Editor, node: fx.Node, sizes: list[int]) -> fx.Node:
    """The rows of all ids, times the weights of the samples."""
    call = lambda target, *args: editor.call(target, *args, like=node)  # noqa: E731
    ids, weights = argument(node, "indices"), argument(node, "per_sample_weights")
    rows: fx.Node = call(
        aten.embedding.default, argument(node, "weight"), call(aten.reshape.default, ids, sizes)
    )
    if weights is None:
        return rows
    weights = call(aten.unsqueeze.default, call(aten.reshape.default, weights, sizes), -1)
    return call(aten.mul.Tensor, rows, weights)


def _any_sizes(editor: Editor, node: fx.Node) -> fx.Node:
    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return editor.call(target, *args, like=node, **kwargs)

    def count(x: fx.Node) -> Any:
        size = (shape(x) or ())[0]
        return size if isinstance(size, int) else call(aten.sym_size.int, x, 0)

    rows, offsets = _rows(editor, node, [-1]), argument(node, "offsets")
    if argument(node, "include_last_offset"):
        offsets = call(aten.slice.Tensor, offsets, 0, 0, -1)
    begun = call(
        aten.ge.Tensor,
        call(aten.arange.default, count(rows)),
        call(aten.unsqueeze.default, offsets, 1),
    )
    bag = call(aten.sub.Tensor, call(aten.sum.dim_IntList, begun, [0]), 1)
    bags = call(aten.unsqueeze.default, call(aten.arange.default, count(offsets)), 1)
    mine = call(aten._to_copy.default, call(aten.eq.Tensor, bags, bag), dtype=dtype(rows))
    total = call(aten.matmul.default, mine, rows)
    if argument(node, "mode") != _MEAN:
        return total
    many = call(aten.clamp.default, call(aten.sum.dim_IntList, mine, [1], True), 1)
    return call(aten.div.Tensor, total, many)
