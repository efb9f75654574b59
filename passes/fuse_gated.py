"""The two linears of a gated MLP become one packed linear that also multiplies.

    gated(linear(x, W_gate), linear(x, W_up), activation) → linear(x, [W_gate; W_up], gated, activation)

One operator reads x once, and the two wide intermediate results are never written: the rows of gate and up are
interleaved in blocks of 16 (docs/dialect.md), so that one tile of the product holds both factors. Where gate and up
are the two halves of one linear's result, its rows are interleaved the same way.

Side conditions: both are packed, read one input, agree on how codes are stored along K, have no epilogue of their
own, and nothing else reads them; group scales fit one float16 multiplier.

Exactness: REAL; the stored bytes are moved, not changed, only the order of a float reference's sums may differ.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..compiler.dialect import gated
from ..compiler.editor import Editor
from ..compiler.graph import shape
from ..compiler.passes import Guarantee, define_pass
from .packed_rows import PackedRows, call_with, interleave, is_plain, read_rows, reads, write_rows
from .row_order import RowOrder, row_order


@define_pass(Guarantee.REAL)
def fuse_gated(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(gated.overload):
        pair = [row_order(node.args[i]) for i in (0, 1)]
        reason = _reason_against(node, pair)
        if reason is not None:
            editor.refused(node, reason)
            continue
        gate, up = pair
        assert not isinstance(gate, str)
        assert not isinstance(up, str)
        rows = _interleaved(editor, gate, up)
        if isinstance(rows, str):
            editor.refused(node, rows)
            continue
        linears = list(dict.fromkeys((gate.linear, up.linear)))
        changes: dict[str, Any] = write_rows(editor, linears, rows)
        count = len(gate.rows.flatten())
        new = call_with(
            editor, linears[0], before=node, **changes, n=count, activation=node.args[2], gated=True
        )
        editor.applied(new, f"gate and up in one linear of {count} features", linears=len(linears))
        editor.replace(node, new)


def _reason_against(node: fx.Node, pair: list[RowOrder | str]) -> str | None:
    for name, side in zip(("gate", "up"), pair, strict=True):
        if isinstance(side, str):
            return f"{name} is not the result of a packed linear: {side}"
        if not is_plain(side.linear):
            return f"the linear of {name} already has an epilogue"
        if side.rows.dim() != 1:
            return f"{name} is a view of its linear's result with {side.rows.dim()} feature dimensions"
    gate, up = pair
    assert not isinstance(gate, str)
    assert not isinstance(up, str)
    sizes = [(shape(side.linear) or ())[:-1] for side in (gate, up)]
    if any(len(size) != len(shape(node) or ()) - 1 for size in sizes):
        return "a view between the linears and the product changes the number of dimensions"
    if reads(gate.linear) != reads(up.linear):
        return "gate and up read different inputs, or store their codes differently"
    inside = {node, *gate.chain, *up.chain}
    for link in (*gate.chain, *up.chain):
        others = [user for user in link.users if user not in inside]
        if others:
            return f"{others[0].name} also reads {link.name}, which would no longer exist"
    return None


def _interleaved(editor: Editor, gate: RowOrder, up: RowOrder) -> PackedRows | str:
    halves = []
    for side in (gate, up):
        rows = read_rows(editor, side.linear)
        if rows is None:
            return "a packed tensor is not a constant"
        halves.append(rows.select(side.rows))
    return interleave(*halves)
