"""Two calls of one operator with the same arguments become one.

Models compute masks, position tables and broadcasts anew in every layer; operators are functions, so the same
arguments give the same value.

Side conditions: the operator draws no random numbers and writes to none of its arguments. Exactness: bitwise.
"""

from __future__ import annotations

import torch
from torch import fx

from ..editor import Editor
from ..passes import Guarantee, define_pass


@define_pass(Guarantee.BITWISE)
def merge_duplicates(editor: Editor) -> None:
    """See the module."""
    first: dict[str, fx.Node] = {}
    merged: dict[str, int] = {}
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not _is_function(node):
            continue
        # Nodes print as their names, which are unique, and strings with quotes, so the text tells all apart.
        kept = first.setdefault(f"{node.target} {node.args!r} {node.kwargs!r}", node)
        if kept is not node:
            name = str(node.target).removeprefix("aten.")
            merged[name] = merged.get(name, 0) + 1
            node.replace_all_uses_with(kept, propagate_meta=False)
            editor.graph.erase_node(node)
    for name, count in merged.items():
        editor.applied(editor.program.output_node, f"merged {count} x {name}", merged=count)


def _is_function(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target.__module__ in ("_operator", "torch") if callable(node.target) else False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable
