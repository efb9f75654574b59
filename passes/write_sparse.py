"""Calls of the sparse linears in place of a dense one: one for a matrix, two for a mixture (`sparse_mixtures`).

    y = a(x W^T + b) + r                       one operator
    y = a((x B^T + b) + x R^T) + r             two: R's result is the residual of B's, then a and r in operators of
                                               their own where a is not the identity, else r is the residual of R's

Parts of quantized weights share the scales, so their codes are those of W; their sums of rows are taken anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.dialect import linear_sparse, linear_sparse_float
from ..compiler.dialect.packing import LANES, ceil_to, row_sums, unpack_groups
from ..compiler.dialect.sparse_packing import PackedSparse
from ..compiler.editor import Editor
from ..compiler.graph import argument
from .packed_rows import arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Stored:
    """A matrix or a part of one, its encoding, and the constants that hold that: places, values, offsets."""

    matrix: Tensor
    packed: PackedSparse
    nodes: tuple[fx.Node, ...]


def write_sparse(editor: Editor, node: fx.Node, parts: Sequence[Stored]) -> fx.Node:
    """A node with the value of the linear `node`, computed from its parts: the whole, or B and R."""
    whole, *beside = parts
    if not beside:
        return _call(editor, node, whole)
    floats = node.target == aten.linear.default
    activation = "none" if floats else argument(node, "activation")
    residual = None if floats else argument(node, "residual")
    (rest,) = beside
    first = {"bias": None, "residual": residual if activation == "none" else None, "activation": "none"}
    low = _call(editor, node, rest, **first, **_sums(editor, node, rest))
    high = _call(editor, node, whole, residual=low, activation="none", **_sums(editor, node, whole))
    if activation == "none":
        return high
    active = _activated(editor, activation, high, node)
    return active if residual is None else editor.call(aten.add.Tensor, active, residual, like=node)


def _call(editor: Editor, node: fx.Node, part: Stored, **changes: Any) -> fx.Node:
    packed = part.packed
    if node.target == aten.linear.default:
        a = {"bias": argument(node, "bias"), "residual": None, "activation": "none", **changes}
        tail = (a["bias"], a["residual"], packed.n, packed.k, packed.layout, a["activation"], False)
        return editor.call(
            linear_sparse_float.overload, argument(node, "input"), *part.nodes, *tail, like=node
        )
    a = {**arguments(node), **changes}
    first = (a[name] for name in ("scale", "wsum", "bias", "residual", "n", "k"))
    last = (a[name] for name in ("group_size", "scale_multiplier", "activation", "gated"))
    form = (packed.layout, packed.bits)
    return editor.call(
        linear_sparse.overload, a["u"], a["params"], *part.nodes, *first, *form, *last, like=node
    )


def _sums(editor: Editor, node: fx.Node, part: Stored) -> dict[str, fx.Node]:
    """The sums of a part's rows, as a change of the call; floats have none."""
    if node.target == aten.linear.default:
        return {}
    a = arguments(node)
    held, n = editor.tensor(a["scale"]), part.packed.n
    assert held is not None
    scale = unpack_groups(held, n, part.packed.k, a["group_size"]).double() * a["scale_multiplier"]
    sums = F.pad(row_sums(part.matrix, scale, None, a["group_size"]), (0, ceil_to(n, LANES) - n))
    return {"wsum": editor.constant(sums.float(), editor.name_of(a["wsum"]))}


def _activated(editor: Editor, activation: str, x: fx.Node, like: fx.Node) -> fx.Node:
    if activation.startswith("gelu"):
        kind = "tanh" if activation == "gelu_tanh" else "none"
        return editor.call(aten.gelu.default, x, like=like, approximate=kind)
    return editor.call({"relu": aten.relu.default, "silu": aten.silu.default}[activation], x, like=like)
