"""Small questions about FX nodes: their place in the user's model, their values, their users."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch.export writes for nodes that belong to no module."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)')


@dataclass(frozen=True)
class Place:
    """Where something is: module path in the user's model, node in the graph, the user's source line."""

    module: str
    node: str
    source: str | None = None

    def __str__(self) -> str:
        named = f"{self.module or '<root>'} (node {self.node})"
        return f"{named}, {self.source}" if self.source else named


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that the node was traced in, '' for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    if path == _NO_MODULE:
        return ""
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def module_class(node: fx.Node) -> str:
    """Qualified class name of the innermost module that the node was traced in, '' where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return ""
    kind = entries[-1][1]
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def source_line(node: fx.Node) -> str | None:
    """`file:line (code)` of the innermost frame outside torch that made the node, or None."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [f for f in frames if "/torch/" not in f[0]]
    if not outside:
        return None
    file, line, _, code = outside[-1]
    return f"{file}:{line}: {code.strip()}"


def place_of(node: fx.Node) -> Place:
    """The node's place, for reports and errors."""
    return Place(module_path(node), node.name, source_line(node))


def value(node: fx.Node) -> Any:
    """The node's fake value (FakeTensor, SymInt, tuple), or None."""
    return node.meta.get("val")


def shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of the node's fake tensor (sizes may be symbolic), or None where it is no tensor."""
    fake = value(node)
    return tuple(fake.shape) if isinstance(fake, Tensor) else None


def dtype(node: fx.Node) -> torch.dtype | None:
    """dtype of the node's fake tensor, or None where it is no tensor."""
    fake = value(node)
    return fake.dtype if isinstance(fake, Tensor) else None


def keep_exact(node: fx.Node, reason: str) -> fx.Node:
    """Mark a constant that is no weight but defines an operator. Passes that round or prune leave it alone."""
    node.meta["isofold_exact"] = reason
    return node


def kept_exact(node: fx.Node) -> str | None:
    """Why a constant must not be rounded, None where it may be."""
    return node.meta.get("isofold_exact")


def static_size(size: Any) -> int | None:
    """`size` as an int where it is not symbolic, else None."""
    return size if isinstance(size, int) else None


def calls(graph: fx.Graph, *targets: object) -> Iterator[fx.Node]:
    """Nodes that call one of the given overloads, in order; safe against edits while iterating."""
    wanted = set(targets)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in wanted and not node._erased:
            yield node


def argument(node: fx.Node, name: str) -> Any:
    """The value of a call's argument by its schema name, with the schema's default where it is not given."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload), f"{node} does not call an operator"
    for position, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            if declared.name in node.kwargs:
                return node.kwargs[name]
            if position < len(node.args) and not declared.kwarg_only:
                return node.args[position]
            return declared.default_value
    raise KeyError(f"{target} has no argument {name!r}")


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake tensor mode (with the shape environment) that the graph's values live in."""
    for node in graph.nodes:
        fake = value(node)
        if isinstance(fake, torch._subclasses.FakeTensor):
            return fake.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)
