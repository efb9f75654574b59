"""Replace every expression of constants by its value.

Positions, ALiBi slopes, `1 + g`, weight norm (`g * v / |v|`), masks of static size: what depends on nothing
but parameters and literals is the same in every run. Evaluated in float64 and rounded once to its own type; where a
step of it is not continuous (rounding a weight to its codes, a comparison, a cast to integers) in the types that the
model has, as the last bit of a quotient decides between two codes there.

Side conditions: the operators are deterministic and read no codes of compressed weights; the sizes are static;
the result is not much larger than what it was computed from (an expanded table would only take memory). Parameters
must not be trained after.
Exactness: real.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..dialect.operator import operator_of
from ..editor import Editor
from ..graph import value
from ..passes import Guarantee, define_pass

_ALWAYS_SMALL = 1 << 16
_GROWTH = 2
_STEPS = {
    torch.ops.aten.round,
    torch.ops.aten.floor,
    torch.ops.aten.ceil,
    torch.ops.aten.trunc,
    torch.ops.aten.sign,
}
"""Operators with float results that are not continuous."""


@define_pass(Guarantee.REAL)
def fold_constants(editor: Editor) -> None:
    """See the module."""
    constant: dict[fx.Node, bool] = {}
    for node in editor.graph.nodes:
        constant[node] = node.op == "get_attr" or (
            node.op == "call_function" and _is_constant(node, constant)
        )
    for node in list(editor.graph.nodes):
        if node._erased or node.op != "call_function" or not constant[node]:
            continue
        fake = value(node)
        if not isinstance(fake, Tensor) or all(constant[user] for user in node.users):
            continue
        sources = _sources(node)
        if any(not isinstance(editor.tensors.get(str(s.target)), Tensor) for s in sources):
            continue
        limit = max(_ALWAYS_SMALL, _GROWTH * sum(editor.tensors[str(s.target)].numel() for s in sources))
        if fake.numel() > limit:
            editor.refused(node, f"its {fake.numel()} elements come from far fewer: kept as an expression")
            continue
        result = _evaluate(editor, node, {}, widen=not _jumps(node, {})).to(fake.dtype)
        largest = max(sources, key=lambda s: editor.tensors[str(s.target)].numel(), default=None)
        name = editor.name_of(largest) if largest is not None else node.name
        editor.applied(node, f"folded {str(node.target).removeprefix('aten.')} of constants")
        editor.replace(node, editor.constant(result.reshape(fake.shape), f"{name}_folded"))


def _is_constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    if node.target is operator.getitem:
        return known[node.all_input_nodes[0]]
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    if operator_of(node.target) is not None and any(not _is_float(s) for s in node.all_input_nodes):
        return False  # codes of a weight: they are decoded where they are read
    fakes = [fake for fake in pytree.tree_leaves(value(node)) if fake is not None]
    static = all(
        isinstance(fake, Tensor) and all(isinstance(size, int) for size in fake.shape) for fake in fakes
    )
    return static and bool(fakes) and all(known[source] for source in node.all_input_nodes)


def _is_float(node: fx.Node) -> bool:
    fake = value(node)
    return isinstance(fake, Tensor) and fake.is_floating_point()


def _sources(node: fx.Node) -> set[fx.Node]:
    if node.op == "get_attr":
        return {node}
    return set().union(*(_sources(source) for source in node.all_input_nodes))


def _jumps(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether the least change of a source can change the value by much: something on the way is not continuous."""
    if node not in known:
        sources = node.all_input_nodes
        packet = getattr(node.target, "overloadpacket", None)
        results = [fake for fake in pytree.tree_leaves(value(node)) if isinstance(fake, Tensor)]
        cast = any(map(_is_float, sources)) and not all(fake.is_floating_point() for fake in results)
        known[node] = packet in _STEPS or cast or any(_jumps(source, known) for source in sources)
    return known[node]


def _evaluate(editor: Editor, node: fx.Node, known: dict[fx.Node, Any], widen: bool) -> Any:
    if node.op == "get_attr":
        held = editor.tensors[str(node.target)]
        return _widen(held) if widen else held
    if node not in known:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _evaluate(editor, n, known, widen))
        if widen:
            args, kwargs = pytree.tree_map(_widen, (args, kwargs))
        with torch.no_grad():
            target: Any = node.target
            known[node] = target(*args, **kwargs)
    return known[node]


def _widen(v: Any) -> Any:
    if isinstance(v, Tensor) and v.is_floating_point():
        return v.to(torch.float64)
    return torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v
