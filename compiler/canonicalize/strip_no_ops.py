"""Remove calls that return their input, and spell every view as a reshape.

Casts to the type a value has, clones, dropout outside training, slices and views of everything, additions of
an integer zero, products with one, concatenations of one value (parts without elements, with which caches begin, are
left out), squeezed dimensions that are not 1: each is the identity on values. A copy differs from its source only under
in-place writes, and captured graphs have none. Nested reshapes are the outer one; transposes in a row that
undo each other cancel.

Side conditions: shapes are compared by their symbolic expressions, so no guard is added; a product with 1.0
goes only where it does not change the type. Exactness: bitwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape, value
from ..passes import Guarantee, define_pass
from .match import (
    CASTS,
    RESHAPES,
    aten,
    dimensions,
    equal_shapes,
    is_call,
    is_float,
    operands,
    permutation,
    slice_bounds,
)


@define_pass(Guarantee.BITWISE)
def strip_no_ops(editor: Editor) -> None:
    """See the module."""
    removed: dict[str, int] = {}
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        if node.target in _ASSERTIONS:
            editor.erase(node)
            removed["assertion"] = removed.get("assertion", 0) + 1
            continue
        _respell(editor, node)
        source = _identity(node)
        if source is not None and _alike(source, node):
            name = str(node.target).removeprefix("aten.")
            removed[name] = removed.get(name, 0) + 1
            editor.replace(node, source)
    for name, count in removed.items():
        editor.applied(editor.program.output_node, f"removed {count} x {name}", removed=count)


_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten._assert_async.msg,
)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Same shape, type and device."""
    return equal_shapes(a, b) and dtype(a) == dtype(b) and value(a).device == value(b).device


def _first(node: fx.Node) -> fx.Node | None:
    return operands(node)[0] if isinstance(operands(node)[0], fx.Node) else None


def _dropout(node: fx.Node) -> fx.Node | None:
    training = argument(node, "train")
    return None if training and argument(node, "p") else _first(node)


def _slice(node: fx.Node) -> fx.Node | None:
    bounds = slice_bounds(node)
    if bounds is not None:
        return _first(node) if bounds[3] == 1 else None
    return _first(node) if argument(node, "step") == 1 and argument(node, "start") in (0, None) else None


def _sum_with_zero(node: fx.Node) -> fx.Node | None:
    other = operands(node)[1]
    # For floating point -0.0 + 0 is 0.0, so only integers qualify.
    if isinstance(other, int) and not isinstance(other, bool) and other == 0 and not is_float(node):
        return _first(node)
    return None


def _product_with_one(node: fx.Node) -> fx.Node | None:
    other = operands(node)[1]
    return (
        _first(node)
        if isinstance(other, (int, float)) and not isinstance(other, bool) and other == 1
        else None
    )


_PERMUTATIONS = (aten.permute.default, aten.transpose.int, aten.t.default)


def _permute(node: fx.Node) -> fx.Node | None:
    source = _first(node)
    order = permutation(node)
    if order == list(range(len(order))):
        return source
    if is_call(source, *_PERMUTATIONS) and isinstance(operands(source)[0], fx.Node):
        inner = permutation(source)
        if [inner[d] for d in order] == list(range(len(order))):
            return operands(source)[0]
    return None


def _concatenation(node: fx.Node) -> fx.Node | None:
    parts = operands(node)[0]
    return parts[0] if len(parts) == 1 else None


_IDENTITIES: dict[object, Callable[[fx.Node], fx.Node | None]] = {
    **dict.fromkeys((*CASTS, aten.type_as.default), _first),
    **dict.fromkeys(RESHAPES, _first),
    **dict.fromkeys(_PERMUTATIONS, _permute),
    aten.clone.default: _first,
    aten.contiguous.default: _first,
    aten.alias.default: _first,
    aten.detach.default: _first,
    aten.detach_.default: _first,
    aten.lift_fresh_copy.default: _first,
    aten.expand.default: _first,
    aten.dropout.default: _dropout,
    aten.native_dropout.default: lambda node: None,
    aten.slice.Tensor: _slice,
    aten.squeeze.dims: lambda node: None if operands(node)[1] else _first(node),
    aten.cat.default: _concatenation,
    aten.add.Tensor: _sum_with_zero,
    aten.sub.Tensor: _sum_with_zero,
    aten.mul.Tensor: _product_with_one,
    aten.div.Tensor: _product_with_one,
    aten.repeat_interleave.self_int: lambda node: _first(node) if operands(node)[1] == 1 else None,
}


def _identity(node: fx.Node) -> fx.Node | None:
    rule = _IDENTITIES.get(node.target)
    source = rule(node) if rule is not None else None
    return source if source is not None and isinstance(value(source), torch.Tensor) else None


def _respell(editor: Editor, node: fx.Node) -> None:
    """Views as reshapes of the value before earlier reshapes, concatenations of what has elements."""
    if node.target is aten.cat.default:
        _leave_out_empty(editor, node)
    if node.target in (aten.squeeze.dim, aten.squeeze.dims):
        _leave_out_wide(node)
    if node.target not in RESHAPES:
        return
    node.target = aten.reshape.default
    source = operands(node)[0]
    while is_call(source, *RESHAPES):
        source = operands(source)[0]
    if source is not operands(node)[0]:
        inner = operands(node)[0]
        node.args = (source, operands(node)[1])
        if isinstance(inner, fx.Node) and not inner.users:
            editor.erase(inner)


def _leave_out_wide(node: fx.Node) -> None:
    """Squeezing a dimension of another size than 1 does nothing in torch, and is an error in ONNX."""
    size = shape(operands(node)[0]) or ()
    dims = dimensions(operands(node)[0], operands(node)[1]) or []
    kept = [d for d in dims if not isinstance(size[d], int) or size[d] == 1]
    if len(kept) < len(dims):
        node.target, node.args = aten.squeeze.dims, (operands(node)[0], kept)


def _leave_out_empty(editor: Editor, node: fx.Node) -> None:
    parts = operands(node)[0]
    kept = [part for part in parts if not _is_empty(part)]
    # Another type takes part in the type of the result, elements or not.
    if not kept or len(kept) == len(parts) or {dtype(part) for part in parts} != {dtype(node)}:
        return
    node.args = (kept, *node.args[1:])
    for part in parts:
        if part not in kept and not part.users and part.op in ("call_function", "get_attr"):
            editor.erase(part)


def _is_empty(node: fx.Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in shape(node) or ())
