"""Building Relax from a program's nodes: one kernel description at a time, with sizes that torch already knows.

A rule (`rules/`) turns one node into Relax expressions. Most write their result as a tensor expression:
`Builder.kernel` gives them the inputs as TE tensors and takes the result's elements as a function of the index. The
result's shape is that of the node's fake tensor, so that a rule never derives one. Equal kernels become one function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from tvm import relax, te, tirx
from tvm.relax.block_builder import BlockBuilder
from tvm.te import create_prim_func

from ...compiler.errors import UnsupportedError
from ...compiler.graph import value
from .symbols import Size, is_polynomial, size_of, symbols_of, to_tir, variable_name

Expr = Any
Value = Any
"""What a node became: a Relax variable, a tuple of values, or a size."""

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.bool: "bool",
}


def dtype_name(dtype: torch.dtype) -> str:
    """TVM's name of a torch dtype. Raises UnsupportedError."""
    if dtype not in DTYPES:
        raise UnsupportedError(
            "TVM has no such element type", expected=", ".join(DTYPES.values()), got=str(dtype)
        )
    return DTYPES[dtype]


def fake(node: fx.Node) -> Tensor:
    """The fake tensor of a node that has one value. Raises UnsupportedError."""
    found = value(node)
    if not isinstance(found, Tensor):
        raise UnsupportedError("A tensor was expected here", got=f"{type(found).__name__} from {node}")
    return found


def sizes(node: fx.Node) -> list[Size]:
    """The shape of a node's value."""
    return [size_of(size) for size in fake(node).shape]


class Kernel:
    """One kernel while it is described: its inputs as TE tensors, and sizes in its own variables."""

    def __init__(self, result: Sequence[Size] | None) -> None:
        self.result = result
        """Shape of the node's value, where it is one tensor."""
        self.variables: dict[str, tuple[Any, Any]] = {}
        self.inputs: list[fx.Node] = []
        self.tensors: list[te.Tensor] = []
        self.tables: list[te.Tensor] = []
        self.table_values: list[Expr] = []

    def size(self, size: Any) -> Expr:
        """A size (int, SymInt, sympy) as an int64 expression of this kernel.

        Divisions, remainders and the like are computed outside: index arithmetic with them is slow, and TVM takes
        minutes to simplify it.
        """
        found = size_of(size)
        if isinstance(found, int):
            return found
        return to_tir(found, self._symbol) if is_polynomial(found) else self._variable(found)

    def _symbol(self, name: str) -> Any:
        return self._variable(sympy.Symbol(name, integer=True))

    def _variable(self, size: sympy.Expr) -> Any:
        name = str(size)
        if name not in self.variables:
            label = variable_name(name) if size.is_symbol else f"size{len(self.variables)}"
            self.variables[name] = (size, tirx.Var(label, "int64"))
        return self.variables[name][1]

    def shape(self, node: fx.Node) -> list[Expr]:
        """The shape of a node's value in this kernel's variables."""
        return [self.size(size) for size in sizes(node)]

    def tensor(self, node: fx.Node) -> te.Tensor:
        """A node's value as an input."""
        for known, tensor in zip(self.inputs, self.tensors, strict=True):
            if known is node:
                return tensor
        tensor = te.placeholder(self.shape(node), dtype_name(fake(node).dtype), f"x{len(self.inputs)}")
        self.inputs.append(node)
        self.tensors.append(tensor)
        return tensor

    def table(self, values: Tensor) -> te.Tensor:
        """A small constant as an input."""
        made = te.placeholder(list(values.shape), dtype_name(values.dtype), f"table{len(self.tables)}")
        self.tables.append(made)
        self.table_values.append(relax.const(values.detach().cpu().numpy(), dtype_name(values.dtype)))
        return made

    def at(self, tensor: te.Tensor, indices: Sequence[Expr], like: Sequence[Size] | None = None) -> Expr:
        """The element that broadcasting to `indices` reads: aligned at the last dimension, sizes of 1 repeated.

        like: the sizes that the indices run over, where a size of the tensor may turn out to be 1 (an expression that
        torch did not simplify): its index then stops at the last element.
        """
        rank = len(tensor.shape)
        own = list(indices)[len(indices) - rank :]
        places = []
        for position, (size, index) in enumerate(zip(tensor.shape, own, strict=True)):
            if _is_one(size):
                places.append(0)
            elif like is not None and not self._same(tensor, position, like[len(like) - rank + position]):
                places.append(tirx.min(index, size - 1))
            else:
                places.append(index)
        return tensor(*places)

    def _same(self, tensor: te.Tensor, position: int, wanted: Size) -> bool:
        """Whether a dimension of an input certainly has this size."""
        for node, known in zip(self.inputs, self.tensors, strict=True):
            if known.same_as(tensor):
                own = sizes(node)[position]
                return str(own) == str(wanted) or sympy.expand(sympy.sympify(own) - wanted) == 0
        return True

    def free_variables(self) -> list[tuple[Size, Any]]:
        """Variables that no input has as a dimension: they come as arguments, in the order of their names."""
        bound = {str(size) for node in self.inputs for size in sizes(node)}
        return [self.variables[name] for name in sorted(self.variables) if name not in bound]


def _is_one(size: Any) -> bool:
    return int(size) == 1 if isinstance(size, int) else isinstance(size, tirx.IntImm) and int(size) == 1


class Builder:
    """A Relax module in the making: values of nodes, sizes, and emitting."""

    def __init__(self, bb: BlockBuilder, tensors: Mapping[str, Any]) -> None:
        self.bb = bb
        self.tensors = tensors
        self.values: dict[fx.Node, Value] = {}
        self.symbols: dict[str, Expr] = {}
        self.fallbacks: dict[str, list[str]] = {}
        """What runs in a way that is known to be slow: reason → names of nodes."""

    # ---- sizes

    def size(self, size: Any) -> Expr:
        """A size as an expression of the executable's variables."""
        return to_tir(size_of(size), self._symbol)

    def _symbol(self, name: str) -> Expr:
        if name not in self.symbols:
            raise UnsupportedError(
                "A size depends on a value that is known only when the program runs",
                got=name,
                hint="split the model before the operator that makes the size",
            )
        return self.symbols[name]

    def shape(self, node_or_fake: fx.Node | Tensor) -> list[Expr]:
        """A shape in the executable's variables."""
        found = node_or_fake if isinstance(node_or_fake, Tensor) else fake(node_or_fake)
        return [self.size(size) for size in found.shape]

    def type_of(self, node_or_fake: fx.Node | Tensor) -> relax.TensorType:
        """The Relax type of a value."""
        found = node_or_fake if isinstance(node_or_fake, Tensor) else fake(node_or_fake)
        return relax.TensorType(self.shape(found), dtype_name(found.dtype))

    # ---- values

    def __getitem__(self, node: fx.Node) -> Value:
        return self.values[node]

    def emit(self, expr: Expr, node: fx.Node) -> Value:
        """Bind an expression to a variable that is named after the node."""
        return self.bb.emit(expr, name_hint=node.name)

    def reshape(self, node: fx.Node, source: fx.Node) -> Value:
        """The same elements in the node's shape (no copy where nothing is fused with it)."""
        if [str(s) for s in sizes(source)] == [str(s) for s in sizes(node)]:
            return self[source]
        return self.emit(relax.op.reshape(self[source], relax.ShapeExpr(self.shape(node))), node)

    def kernel(
        self,
        node: fx.Node,
        describe: Callable[[Kernel], te.Tensor | Sequence[te.Tensor]],
        name: str | None = None,
        results: Sequence[Tensor] | None = None,
    ) -> Value:
        """Emit the kernel whose results `describe` returns; `results` are their fakes where not the node's own."""
        k = Kernel(sizes(node) if isinstance(value(node), Tensor) else None)
        made = describe(k)
        outputs = [made] if isinstance(made, te.Tensor) else list(made)
        free = k.free_variables()
        function = create_prim_func([*k.tensors, *k.tables, *(var for _, var in free), *outputs], "int64")
        function = function.without_attr("global_symbol")
        place = self.bb.add_func(function, name or short_name(node))
        arguments = [*(self[n] for n in k.inputs), *k.table_values, *(self.size(size) for size, _ in free)]
        fakes = list(results) if results is not None else [fake(node)]
        types = [self.type_of(f) for f in fakes]
        call = relax.call_tir(place, arguments, types[0] if isinstance(made, te.Tensor) else types)
        return self.emit(call, node)

    def elements(
        self,
        node: fx.Node,
        inputs: Sequence[fx.Node],
        body: Callable[..., Expr],
        name: str | None = None,
    ) -> Value:
        """Emit a kernel of one result: `body(k, *tensors)` gives the function of its indices."""

        def describe(k: Kernel) -> te.Tensor:
            tensors = [k.tensor(n) for n in inputs]
            at = body(k, *tensors)
            return te.compute(k.shape(node), lambda *i: at(*i), name="y")

        return self.kernel(node, describe, name)


def short_name(node: fx.Node) -> str:
    """The operator's name for the kernels made for it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[1]).strip("_")
    return getattr(target, "__name__", "kernel")


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in; sizes (nodes that are numbers) as numbers or sympy."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for position, declared in enumerate(target._schema.arguments):
        if declared.name in node.kwargs:
            given = node.kwargs[declared.name]
        elif position < len(node.args) and not declared.kwarg_only:
            given = node.args[position]
        else:
            given = declared.default_value
        found[declared.name] = _plain(given)
    return found


def _plain(given: Any) -> Any:
    if isinstance(given, fx.Node):
        known = value(given)
        return given if isinstance(known, (Tensor, tuple, list)) else plain_number(known)
    if isinstance(given, (list, tuple)):
        return [_plain(item) for item in given]
    return plain_number(given)


def plain_number(given: Any) -> Any:
    """Symbolic ints as sizes; anything else as it is."""
    if isinstance(given, (torch.SymInt, torch.SymFloat)):
        return size_of(given)
    return given


def depends_on_symbols(node: fx.Node) -> bool:
    """Whether a node's value has a size that is not a number."""
    found = value(node)
    leaves = found if isinstance(found, (tuple, list)) else [found]
    return any(
        bool(symbols_of(size_of(size))) for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape
    )


GETITEM = operator.getitem
