"""Calls of one operator on the same arguments become one call, and so do sizes that are the same symbol.

Models compute masks, position tables and their views anew in every layer, and every view costs a runtime one
operator. Captured graphs are functional, so a call's result depends on its arguments alone. A size is equal to every
other with its symbolic expression, whatever tensor it is taken from; reading all from the first frees the others.

Side conditions: the operator draws no random numbers and writes to none of its arguments. Exactness: BITWISE.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..compiler.editor import Editor
from ..compiler.graph import place_of
from ..compiler.passes import Guarantee, define_pass


@define_pass(Guarantee.BITWISE)
def fuse_duplicates(editor: Editor) -> None:
    """See the module."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    counts: dict[str, int] = {}
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not _is_pure(node):
            continue
        key = _key(node)
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept, propagate_meta=False)
            editor.graph.erase_node(node)
            name = getattr(node.target, "__name__", str(node.target))
            counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        at = place_of(editor.program.output_node)
        editor.applied(at, f"{count} calls of {name} on arguments seen before", removed=count)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _key(node: fx.Node) -> tuple[Any, ...]:
    """Target and arguments; values of different types (1 and 1.0, 0.0 and -0.0) stay apart."""
    size = node.meta.get("val")
    if node.target == torch.ops.aten.sym_size.int and isinstance(size, torch.SymInt):
        return (node.target, size.node.expr)
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    return (
        node.target,
        str(structure),
        *((leaf,) if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves),
    )
