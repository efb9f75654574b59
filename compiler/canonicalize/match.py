"""Reading expressions up to association and commutation, so that one matcher covers many spellings.

`product` reads a node as `coefficient * factor * factor * ...`, `total` as `constant + product + product + ...`.
Both look through inner nodes that nothing else reads (an inner value with a second reader must stay, so it is a
leaf), through scalars on either side, negation, and division by a scalar. What they return is equal to the node
over the reals; only the order of the roundings differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import argument, dtype, shape, value

aten = torch.ops.aten

MULTIPLICATIONS = (aten.mul.Tensor, aten.mul.Scalar)
DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
ADDITIONS = (aten.add.Tensor, aten.add.Scalar)
SUBTRACTIONS = (aten.sub.Tensor, aten.sub.Scalar)
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
VIEWS = (
    *RESHAPES, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dims,
    aten.squeeze.dim, aten.unflatten.int, aten.flatten.using_ints,
)  # fmt: skip
"""What moves every element of a tensor and copies none."""


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether `node` calls one of the overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a call. Their types follow from the operator's schema, which type checkers cannot see."""
    return node.args


def same(a: float, b: float) -> bool:
    """Equal as the constants that people type: to seven digits."""
    return abs(a - b) <= 1e-7 * max(abs(a), abs(b))


def scalar(editor: Editor, operand: object) -> float | None:
    """The number that an operand stands for: a literal, or a constant tensor of one element."""
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return float(operand)
    tensor = editor.tensor(operand)
    if tensor is not None and tensor.numel() == 1 and tensor.dtype != torch.bool:
        return float(tensor)
    if (
        is_call(operand, aten.full.default)
        and not operands(operand)[0]
        and isinstance(operands(operand)[1], (int, float))
    ):
        return float(operands(operand)[1])
    return None


def is_float(node: object) -> TypeGuard[fx.Node]:
    """Whether `node` is a floating-point tensor."""
    kind = dtype(node) if isinstance(node, fx.Node) else None
    return kind is not None and kind.is_floating_point


@dataclass
class Product:
    """coefficient * factors[0] * factors[1] * ...; `nodes` are the products read through, outermost first."""

    coefficient: float = 1.0
    factors: list[fx.Node] = field(default_factory=list)

    def without(self, *removed: fx.Node) -> Product | None:
        """The product with each of `removed` divided out, or None where one is no factor."""
        rest = list(self.factors)
        for factor in removed:
            if factor not in rest:
                return None
            rest.remove(factor)
        return Product(self.coefficient, rest)

    def is_plain(self, node: fx.Node) -> bool:
        """Whether the product is `node` itself."""
        return self.coefficient == 1.0 and self.factors == [node]


@dataclass
class Total:
    """constant + terms[0] + terms[1] + ..."""

    constant: float = 0.0
    terms: list[Product] = field(default_factory=list)


def product(editor: Editor, node: object) -> Product:
    """Read a node (or number) as a product. The node itself may have several readers, inner ones may not."""
    result = Product()
    _multiply(editor, node, result, root=True)
    return result


def _multiply(editor: Editor, node: object, into: Product, root: bool = False) -> None:
    number = scalar(editor, node)
    if number is not None:
        into.coefficient *= number
        return
    assert isinstance(node, fx.Node)
    inner = is_float(node) and (root or len(node.users) == 1)
    if inner and is_call(node, *MULTIPLICATIONS):
        for operand in operands(node)[:2]:
            _multiply(editor, operand, into)
    elif inner and is_call(node, aten.neg.default):
        into.coefficient = -into.coefficient
        _multiply(editor, operands(node)[0], into)
    elif inner and is_call(node, *DIVISIONS) and scalar(editor, operands(node)[1]):
        into.coefficient /= scalar(editor, operands(node)[1]) or 1.0
        _multiply(editor, operands(node)[0], into)
    else:
        into.factors.append(node)


def total(editor: Editor, node: object) -> Total:
    """Read a node as a sum of products."""
    result = Total()
    _add(editor, node, 1.0, result, root=True)
    return result


def _add(editor: Editor, node: object, sign: float, into: Total, root: bool = False) -> None:
    number = scalar(editor, node)
    if number is not None:
        into.constant += sign * number
        return
    assert isinstance(node, fx.Node)
    inner = is_float(node) and (root or len(node.users) == 1)
    if inner and is_call(node, *ADDITIONS, *SUBTRACTIONS):
        second = sign * float(argument(node, "alpha")) * (-1.0 if is_call(node, *SUBTRACTIONS) else 1.0)
        _add(editor, operands(node)[0], sign, into)
        _add(editor, operands(node)[1], second, into)
    elif inner and is_call(node, aten.rsub.Scalar):
        _add(editor, operands(node)[1], sign, into)
        _add(editor, operands(node)[0], -sign, into)
    else:
        read = product(editor, node) if inner else Product(1.0, [node])
        into.terms.append(Product(sign * read.coefficient, read.factors))


def power(editor: Editor, node: object) -> tuple[fx.Node, float] | None:
    """(x, n) where the node is x to the n-th power: pow, square, or a product of one value with itself."""
    if is_call(node, aten.pow.Tensor_Scalar):
        base, exponent = operands(node)
        return (base, float(exponent)) if isinstance(base, fx.Node) else None
    if is_call(node, aten.square.default):
        return (operands(node)[0], 2.0) if isinstance(operands(node)[0], fx.Node) else None
    if is_call(node, *MULTIPLICATIONS):
        read = product(editor, node)
        if (
            read.coefficient == 1.0
            and read.factors
            and read.factors.count(read.factors[0]) == len(read.factors)
        ):
            return read.factors[0], float(len(read.factors))
    return None


def powers(editor: Editor, read: Product) -> dict[fx.Node, float]:
    """Factors with their exponents, inner powers included: 2 * x * x**2 gives {x: 3}."""
    exponents: dict[fx.Node, float] = {}
    for factor in read.factors:
        base, exponent = power(editor, factor) or (factor, 1.0)
        exponents[base] = exponents.get(base, 0.0) + exponent
    return exponents


def either_order(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The two operands of a commutative call, in both orders."""
    yield operands(node)[0], operands(node)[1]
    yield operands(node)[1], operands(node)[0]


def uncast(node: Any) -> Any:
    """The value before a cast between floating-point types, or the node itself."""
    if is_call(node, *CASTS) and is_float(node) and is_float(operands(node)[0]):
        return operands(node)[0]
    return node


def dimensions(node: fx.Node, dims: Any) -> list[int] | None:
    """Dimensions as non-negative numbers, or None where `node` is no tensor."""
    size = shape(node)
    if size is None:
        return None
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return [d % max(len(size), 1) for d in listed]


def is_last(node: fx.Node, dims: Any) -> bool:
    """Whether `dims` are exactly the last dimension of `node`."""
    size = shape(node)
    return size is not None and dims is not None and dimensions(node, dims) == [len(size) - 1]


def equal_sizes(a: object, b: object) -> bool:
    """Whether two sizes are known to be equal (symbolic ones compare by expression, without adding guards)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return False


def equal_shapes(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have the same shape, size by size."""
    first, second = shape(a), shape(b)
    if first is None or second is None or len(first) != len(second):
        return False
    return all(equal_sizes(x, y) for x, y in zip(first, second, strict=True))


def vector(editor: Editor, node: object, size: object) -> Tensor | None:
    """A constant that acts along the last dimension only, as `[size]`; None where it is another kind of operand."""
    tensor = editor.tensor(node)
    if tensor is None or tensor.dim() == 0 or tensor.shape[-1] != size or tensor.numel() != size:
        return None
    return tensor.reshape(-1)


def is_constant(editor: Editor, node: object) -> bool:
    """Whether `node` is a stored tensor or a chain of views of one."""
    while _is_static_view(node):
        node = operands(node)[0]
    return editor.tensor(node) is not None


def _is_static_view(node: object) -> TypeGuard[fx.Node]:
    """Whether a call views a tensor with sizes that are numbers."""
    return is_call(node, *VIEWS) and len(node.all_input_nodes) == 1


def constant_matrix(editor: Editor, node: fx.Node, matrix: Callable[[Tensor], Tensor]) -> fx.Node | None:
    """`matrix` (views only) of what a constant holds, as a constant; None where the node is not `is_constant`.

    It is the stored matrix itself where all views together leave that as it is, so that tied weights stay one.
    """
    chain: list[fx.Node] = []
    source = node
    while _is_static_view(source):
        chain.append(source)
        source = operands(source)[0]
    stored = editor.tensor(source)
    if stored is None:
        return None

    def wanted(tensor: Tensor) -> Tensor:
        for view in reversed(chain):
            tensor = view.target(tensor, *operands(view)[1:], **view.kwargs)  # type: ignore[operator]  # an overload
        return matrix(tensor)

    held = wanted(stored)
    if stored.shape == held.shape:
        # Which stored element is where: the same views of a table of indices.
        table = torch.arange(stored.numel()).reshape(stored.shape)
        if torch.equal(wanted(table), table):
            return source
    name = editor.name_of(source)
    return editor.constant(held, f"{name}_transposed" if stored.dim() == 2 else f"{name}_matrix")


def slice_bounds(node: fx.Node) -> tuple[int, int, int, int] | None:
    """(dimension, start, end, step) of a slice with static bounds of a static dimension, end cut to the size."""
    source = operands(node)[0]
    size = shape(source) if isinstance(source, fx.Node) else None
    if not is_call(node, aten.slice.Tensor) or size is None:
        return None
    dim, start, end, step = (argument(node, name) for name in ("dim", "start", "end", "step"))
    dim %= len(size)
    length = size[dim]
    if not all(isinstance(v, int) or v is None for v in (start, end, step)) or not isinstance(length, int):
        return None
    low, high, stride = slice(start, end, step).indices(length)
    return dim, low, high, stride


def permutation(node: fx.Node) -> list[int]:
    """Which dimension of its input each dimension of a permute, transpose or t is."""
    rank = len(shape(node) or ())
    order = list(range(rank))
    if node.target == aten.permute.default:
        return [d % rank for d in operands(node)[1]]
    if node.target == aten.t.default:
        return order[::-1]
    a, b = (int(d) % rank for d in operands(node)[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def fake_dim(node: fx.Node) -> int:
    """Rank of a tensor node."""
    fake = value(node)
    assert isinstance(fake, Tensor), f"{node} is no tensor"
    return fake.dim()
