"""Matrix products.

Float linears with a constant weight arrive as `isofold.linear_dense` (`passes/pack_dense_linears.py`), and attention
is an operator of the op library too. What is left are products of two activations: batched matrix products of TVM.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import te

from ..builder import Builder, Kernel, dtype_name, fake
from .registry import aten, rule

Expr = Any


def product(
    b: Builder,
    node: fx.Node,
    x: fx.Node,
    y: fx.Node,
    bias: fx.Node | None = None,
    *,
    transposed: bool = False,
    alpha: float = 1,
    beta: float = 1,
) -> Any:
    """alpha x y + beta bias with torch.matmul's broadcasting; `transposed`: y is `[..., N, K]`."""
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        left, right = k.tensor(x), k.tensor(y)
        added = k.tensor(bias) if bias is not None else None
        vector_left, vector_right = len(left.shape) == 1, len(right.shape) == 1
        axis = te.reduce_axis((0, left.shape[-1]), "k")
        shape = k.shape(node)

        def element(*i: Expr) -> Expr:
            own = list(i)
            column = [] if vector_right else [own.pop()]
            row = [] if vector_left else [own.pop()]
            inner = [*column, axis] if transposed else [axis, *column]
            return te.sum(k.at(left, [*own, *row, axis]) * k.at(right, [*own, *inner]), axis=axis)

        y_ = te.compute(shape, element, name="product")
        if added is None and alpha == 1:
            return y_

        def finished(*i: Expr) -> Expr:
            v = y_(*i) if alpha == 1 else y_(*i) * te.const(alpha, dtype)
            if added is None:
                return v
            other = k.at(added, i)
            return v + (other if beta == 1 else other * te.const(beta, dtype))

        return te.compute(shape, finished, name="y")

    return b.kernel(node, describe)


@rule(aten.linear.default)
def _linear(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    return product(b, node, x, weight, bias, transposed=True)


@rule(aten.addmm.default)
def _addmm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    bias, x, weight = a["self"], a["mat1"], a["mat2"]
    return product(b, node, x, weight, bias, alpha=a["alpha"], beta=a["beta"])


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    x, y = list(a.values())[:2]
    return product(b, node, x, y)


@rule(aten.baddbmm.default)
def _baddbmm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return product(b, node, a["batch1"], a["batch2"], a["self"], alpha=a["alpha"], beta=a["beta"])


@rule(aten.outer.default)
def _outer(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return b.elements(node, [a["self"], a["vec2"]], lambda k, x, y: lambda i, j: x(i) * y(j))
