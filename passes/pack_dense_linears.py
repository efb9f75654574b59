"""Float32 weights of linears take the layout that kernels read: panels of 32 rows, K outermost in each.

    linear(x, W, b)      → linear_dense(x, panels of W, b)         W a float32 constant

For backends without a float matrix product of their own; ONNX Runtime packs float weights itself when it loads them.

Side conditions: the weight is a constant float32 matrix, and so is the activation's type.

Exactness: REAL; the values are moved, not changed, only the order of the sums may differ.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.dialect import linear_dense
from ..compiler.dialect.dense_packing import pack_dense
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype
from ..compiler.passes import Guarantee, define_pass
from .layers import constant_name

aten = torch.ops.aten


@define_pass(Guarantee.REAL)
def pack_dense_linears(editor: Editor) -> None:
    """See the module."""
    made: dict[fx.Node, fx.Node] = {}
    for node in editor.calls(aten.linear.default):
        weight = argument(node, "weight")
        held = editor.tensor(weight)
        if held is None:
            editor.refused(node, "its weight is computed, so it cannot be stored in another order")
            continue
        if held.dim() != 2 or held.dtype != torch.float32 or dtype(node) != torch.float32:
            editor.refused(
                node, f"its weight is {held.dtype} {list(held.shape)}: panels are of float32 matrices"
            )
            continue
        n, k = held.shape
        if weight not in made:
            made[weight] = editor.constant(pack_dense(held.detach()), constant_name(editor, weight, "panels"))
        tail = (argument(node, "bias"), None, n, k, "none", False)
        new = editor.call(linear_dense.overload, argument(node, "input"), made[weight], *tail, like=node)
        editor.replace(node, new)
        editor.applied(new, f"float32 {n} x {k} in panels")
