"""Matrix products.

A linear with a constant weight goes to `linear_of_constant`, the one place where a packed float kernel is put in. What is
left are products of two activations (attention is an operator of the op library): batched matrix products of TVM.
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


def linear_of_constant(
    b: Builder, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, *, transposed: bool
) -> Any | None:
    """A linear whose weight `[N, K]` (`transposed`: `[K, N]`) is a parameter; None where the packed kernel is not for it."""
    try:
        from ..dense_linear import dense_linear
    except ImportError:
        return None
    return dense_linear(b, node, x, weight, bias, transposed=transposed)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


@rule(aten.linear.default)
def _linear(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if _is_parameter(weight) and (bias is None or _is_parameter(bias)):
        made = linear_of_constant(b, node, x, weight, bias, transposed=False)
        if made is not None:
            return made
    return product(b, node, x, weight, bias, transposed=True)


@rule(aten.addmm.default)
def _addmm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    bias, x, weight = a["self"], a["mat1"], a["mat2"]
    plain = a["alpha"] == 1 and a["beta"] == 1 and fake(bias).dim() == 1
    if plain and _is_parameter(weight) and _is_parameter(bias):
        made = linear_of_constant(b, node, x, weight, bias, transposed=True)
        if made is not None:
            return made
    return product(b, node, x, weight, bias, alpha=a["alpha"], beta=a["beta"])


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    x, y = list(a.values())[:2]
    if _is_parameter(y) and fake(y).dim() == 2:
        made = linear_of_constant(b, node, x, y, None, transposed=True)
        if made is not None:
            return made
    return product(b, node, x, y)


@rule(aten.baddbmm.default)
def _baddbmm(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return product(b, node, a["batch1"], a["batch2"], a["self"], alpha=a["alpha"], beta=a["beta"])


@rule(aten.outer.default)
def _outer(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return b.elements(node, [a["self"], a["vec2"]], lambda k, x, y: lambda i, j: x(i) * y(j))
