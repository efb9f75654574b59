"""Two calls of one operator with the same arguments become one, and so do sizes that are one symbol.

Models compute masks, position tables and broadcasts anew in every layer; operators are functions, so the same
arguments give the same value. A size equals every other with its symbolic expression, whatever tensor it is read
from; reading all from the first keeps no other tensor alive.

Side conditions: the operator draws no random numbers and writes to none of its arguments. Exactness: bitwise.
"""

from __future__ import annotations

import torch
from torch import fx

from ..editor import Editor
from ..graph import value
from ..passes import Guarantee, define_pass


@define_pass(Guarantee.BITWISE)
def merge_duplicates(editor: Editor) -> None:
    """See the module."""
    first: dict[str, fx.Node] = {}
    merged: dict[str, int] = {}
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not _is_function(node):
            continue
        kept = first.setdefault(_key(node), node)
        if kept is not node:
            name = str(node.target).removeprefix("aten.")
            merged[name] = merged.get(name, 0) + 1
            node.replace_all_uses_with(kept, propagate_meta=False)
            editor.graph.erase_node(node)
    for name, count in merged.items():
        editor.applied(editor.program.output_node, f"merged {count} x {name}", merged=count)


def _key(node: fx.Node) -> str:
    size = value(node)
    if node.target == torch.ops.aten.sym_size.int and isinstance(size, torch.SymInt):
        return f"size {size.node.expr}"
    # Nodes print as their names, which are unique, and strings with quotes, so the text tells all apart.
    return f"{node.target} {node.args!r} {node.kwargs!r}"


def _is_function(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target.__module__ in ("_operator", "torch") if callable(node.target) else False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not node.target._schema.is_mutable
