"""`activation(gate) * up` becomes `isofold.gated(gate, up, activation)` (GLU variants, arXiv 2002.05202).

`aten.glu(x)` is sigmoid(second half) * first half, for which no epilogue exists, so it is left alone.

Side conditions: the activation's result is read by the product only (otherwise it is computed anyway), both
sides have one shape (a broadcast gate is a scaling), and the other side is no constant. Exactness: bitwise but
for the order of the two factors.
"""

from __future__ import annotations

import torch
from torch import fx

from ..dialect.activation import ACTIVATIONS
from ..editor import Editor
from ..graph import argument, dtype, only_user
from ..passes import Guarantee, define_pass
from .match import aten, either_order, equal_shapes, is_call, is_float, operands


@define_pass(Guarantee.REAL)
def canonicalize_gated(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.mul.Tensor):
        for gated, up in either_order(node):
            activation = activation_name(gated)
            if (
                activation is None
                or up is gated
                or not isinstance(up, fx.Node)
                or not is_float(up)
                or editor.tensor(up) is not None
            ):
                continue
            if only_user(gated) is not node:
                editor.refused(node, f"the result of {activation} has other readers than the product")
                continue
            gate = operands(gated)[0]
            if not equal_shapes(gate, up) or dtype(gate) != dtype(up):
                editor.refused(
                    node, f"{activation}(gate) and the other factor have different shapes or types"
                )
                continue
            editor.applied(node, f"gated product, {activation}")
            editor.replace(
                node, editor.call(torch.ops.isofold.gated.default, gate, up, activation, like=node)
            )
            break


def activation_name(node: object) -> str | None:
    """The name in `dialect.activation` of the function that a node calls, or None."""
    if is_call(node, aten.gelu.default):
        name = "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu"
    elif is_call(node, aten.silu.default):
        name = "silu"
    elif is_call(node, aten.relu.default):
        name = "relu"
    else:
        return None
    assert name in ACTIVATIONS
    return name
