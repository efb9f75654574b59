"""Give every reader of a shared table its own copy, where sharing it is what forbids a fold.

    y = E[ids], logits = h E^T     becomes     y = E1[ids], logits = h E2^T,   E1 = E2 = E

Why: one table ties the basis and scale of what it writes to those of what it reads, so the last norm's gain cannot go
into the head and the residual stream cannot turn. Copies are free of each other. The price is the table's bytes once
more, which the report states; nothing is untied unless more gains fold with it than without.

BITWISE.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.editor import Editor
from ..compiler.graph import argument
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import analyse

aten = torch.ops.aten


@define_pass(Guarantee.BITWISE)
def untie_embeddings(editor: Editor) -> None:
    """Copy tables that are both looked up and multiplied with, where a gain folds then that does not now."""
    shared = list(_shared(editor))
    if not shared:
        return
    before = len(analyse(editor.program).foldable)
    copies = []
    for table, readers in shared:
        held = editor.tensors[str(table.target)]
        for reader in readers:
            copy = editor.constant(held.clone(), f"{table.target}_untied")
            reader.replace_input_with(table, copy)
            copies.append((table, reader, held.numel() * held.element_size()))
    after = len(analyse(editor.finish()).foldable)
    for table, reader, size in copies:
        if after > before:
            editor.applied(reader, f"reads its own copy of {table.target}: {size} bytes more", bytes=size)
        else:
            editor.refused(
                reader, f"shares {table.target} with an embedding, but untying it would fold no more gains"
            )
    if after <= before:
        for table, reader, _ in copies:
            reader.replace_input_with(argument(reader, "weight"), table)


def _shared(editor: Editor) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Tables that an embedding and linears read, with those linears."""
    found = []
    for node in editor.graph.nodes:
        if node.op == "get_attr" and any(u.target is aten.embedding.default for u in node.users):
            linears = [
                u for u in node.users if u.target is aten.linear.default and argument(u, "weight") is node
            ]
            if linears:
                found.append((node, linears))
    return found
