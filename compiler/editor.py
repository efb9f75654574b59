"""`Editor`: the one way in which passes change graphs.

It works on a copy, keeps every node's fake value and place up to date, collects what was applied and
refused, and hands back a new, well-formed Program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from .graph import Place, calls, fake_mode_of, place_of, value
from .program import Program

_PLACE_KEYS = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")


class Editor:
    """Edits a copy of a program's graph and tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.copy_graph()
        self.tensors: dict[str, Any] = dict(program.tensors)
        self.example_args, self.example_kwargs = program.example_args, program.example_kwargs
        self.dynamic_shapes: Any = program.dynamic_shapes
        self.caches = program.caches
        self.applied_entries: list[tuple[Place, str, dict[str, Any]]] = []
        self.refused_entries: list[tuple[Place, str]] = []
        self._mode = fake_mode_of(self.graph)
        self._reads = {str(n.target): n for n in self.graph.nodes if n.op == "get_attr"}

    def calls(self, *targets: object) -> Iterator[fx.Node]:
        """Nodes that call one of the overloads, in graph order; editing while iterating is fine."""
        return calls(self.graph, *targets)

    def tensor(self, node: object) -> Tensor | None:
        """The constant that a `get_attr` node reads, or None for every other node or value."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            held = self.tensors.get(str(node.target))
            return held if isinstance(held, Tensor) else None
        return None

    def constant(self, tensor: Tensor, name: str) -> fx.Node:
        """A node that reads a new constant; `name` is dotted, and made unique where it is taken."""
        unique, count = name, 1
        while unique in self.tensors:
            unique, count = f"{name}_{count}", count + 1
        self.tensors[unique] = tensor.detach().contiguous()
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", unique, (), {}, name=unique.replace(".", "_"))
        node.meta["val"] = self._mode.from_tensor(self.tensors[unique], static_shapes=True)
        self._reads[unique] = node
        return node

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Give an existing constant another value; the one of an expendable program is freed at once."""
        self.tensors[name] = tensor
        if self.program.expendable:
            self.program.tensors.pop(name, None)

    def name_of(self, node: fx.Node) -> str:
        """The dotted name of the constant that a `get_attr` node reads."""
        return str(node.target)

    def call(
        self, target: Any, *args: Any, like: fx.Node, before: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """Insert a call before `before` (default: `like`), with the place of `like`, and compute its fake value."""
        with self.graph.inserting_before(before or like):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update({key: like.meta[key] for key in _PLACE_KEYS if key in like.meta})
        self.refresh(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Recompute the fake value of a call from those of its arguments."""
        args, kwargs = map_arg((node.args, node.kwargs), value)
        with self._mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator] # call_function targets are callable

    def refresh_all(self) -> None:
        """Recompute every fake value, after constants or numbers of the graph have changed their sizes."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and isinstance(held := self.tensors.get(str(node.target)), Tensor):
                node.meta["val"] = self._mode.from_tensor(held, static_shapes=True)
            elif node.op == "call_function":
                self.refresh(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` read `new`, and erase `old` with all that only it needed."""
        old.replace_all_uses_with(new, propagate_meta=False)
        self.erase(old)

    def erase(self, node: fx.Node) -> None:
        """Erase a node without users, and then its inputs where nothing else reads them."""
        inputs = list(node.all_input_nodes)
        self.graph.erase_node(node)
        for source in inputs:
            if not source._erased and not source.users and source.op in ("call_function", "get_attr"):
                if source.op == "get_attr":
                    self._reads.pop(str(source.target), None)
                self.erase(source)

    def applied(self, at: fx.Node | Place, what: str, **facts: Any) -> None:
        """Record a change."""
        self.applied_entries.append((at if isinstance(at, Place) else place_of(at), what, facts))

    def refused(self, at: fx.Node | Place, reason: str) -> None:
        """Record a place left alone, and why."""
        self.refused_entries.append((at if isinstance(at, Place) else place_of(at), reason))

    def finish(self) -> Program:
        """The edited program, checked for well-formedness."""
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return Program(
            self.graph,
            self.tensors,
            self.example_args,
            self.example_kwargs,
            self.dynamic_shapes,
            self.program.records,
            self.caches,
        )
