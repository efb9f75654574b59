"""The linears of queries, keys and values become one, which attention reads with head offsets.

    attention(view(linear(x, Wq)), view(linear(x, Wk)), view(linear(x, Wv)))
        → y = view(linear(x, [Wq; Wk; Wv])), attention(y, y, y, q_start = 0, k_start = Hq, v_start = Hq + Hk)

x is read once, and nothing is sliced: each of the three is a range of heads of one tensor. Rotary embedding turns
heads one by one, so heads that are turned come first, and one operator turns them. The same form serves models that
already have one linear and take its result apart: where q, k and v alternate inside each head, or only keys and
values come from one input, the rows of the packed weight are put in that order.

Side conditions: the linears are packed, read one input, agree on how codes are stored along K, have no epilogue, and
nothing but this attention reads their results; heads have one size; turned ones have the same tables; group scales
fit one float16 multiplier. Linears that read one value but do not meet in an attention stay apart: their
results would have to be copied out of the wider one.

Exactness: REAL; the stored bytes are moved, not changed, only the order of a float reference's sums may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import is_call
from ..compiler.dialect import attention, rotary
from ..compiler.editor import Editor
from ..compiler.graph import argument, shape
from ..compiler.passes import Guarantee, define_pass
from .packed_rows import (
    LINEARS,
    PackedRows,
    arguments,
    call_with,
    concatenate,
    inputs,
    is_plain,
    read_rows,
    reads,
    write_rows,
)
from .row_order import RowOrder, row_order

aten = torch.ops.aten


@dataclass(frozen=True)
class _Role:
    """Queries, keys or values of an attention, as heads of a packed linear."""

    name: str
    position: int
    turn: fx.Node | None
    order: RowOrder
    rows: Tensor
    """int64 `[heads, D]`: the linear's output features."""

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Everything that would go."""
        return self.order.chain if self.turn is None else (*self.order.chain, self.turn)


@define_pass(Guarantee.REAL)
def fuse_linears(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(attention.overload):
        roles: list[_Role] = []
        for position, name in enumerate(("queries", "keys", "values")):
            role = _role(node, position, name)
            if isinstance(role, str):
                editor.refused(node, f"{name} stay apart: {role}")
            else:
                roles.append(role)
        roles = _unshared(editor, node, roles)
        groups: dict[tuple[object, ...], list[_Role]] = {}
        for role in roles:
            key = (*reads(role.order.linear), role.rows.shape[1])
            groups.setdefault(key, []).append(role)
        current = node
        for group in groups.values():
            if len(group) > 1:
                current = _merge(editor, current, group)
    _report_apart(editor)


def _role(node: fx.Node, position: int, name: str) -> _Role | str:
    x: Any = node.args[position]
    turn = None
    if is_call(x, rotary.overload):
        _, _, _, head_dim_index, heads, _ = x.args
        if head_dim_index != 2 or heads not in (-1, (shape(x) or ())[2]):
            return "only a part of their heads is turned"
        turn, x = x, x.args[0]
    order = row_order(x)
    if isinstance(order, str):
        return order
    if not is_plain(order.linear):
        return f"the linear {order.linear.name} has an epilogue"
    if order.rows.dim() != 2 or order.leading is None or len(order.leading) != 2:
        return "no view splits the linear's result into heads"
    start = int(node.args[6 + position])  # type: ignore[arg-type]  # a number, by the operator's schema
    count = int(argument(node, "heads" if position == 0 else "kv_heads"))
    return _Role(name, position, turn, order, order.rows[start : start + count])


def _unshared(editor: Editor, node: fx.Node, roles: list[_Role]) -> list[_Role]:
    """The roles whose nodes nothing else reads; dropping one can expose another."""
    while True:
        inside = {node, *(link for role in roles for link in role.nodes)}
        for role in roles:
            other = next((u for link in role.nodes for u in link.users if u not in inside), None)
            if other is not None:
                editor.refused(node, f"{role.name} stay apart: {other.name} ({other.target}) also reads them")
                roles = [r for r in roles if r is not role]
                break
        else:
            return roles


def _merge(editor: Editor, node: fx.Node, group: list[_Role]) -> fx.Node:
    names = " and ".join(role.name for role in group)
    tables = {(*role.turn.args[1:4], role.turn.args[5]) for role in group if role.turn is not None}
    if len(tables) > 1:
        editor.refused(node, f"{names} stay apart: they are turned by different tables")
        return node
    group = sorted(group, key=lambda role: role.turn is None)
    linears = sorted({role.order.linear for role in group})
    rows = _rows(editor, linears, group)
    if isinstance(rows, str):
        editor.refused(node, f"{names} stay apart: {rows}")
        return node
    heads, depth = sum(len(role.rows) for role in group), group[0].rows.shape[1]
    first = linears[0]
    wide = first
    if rows is not None:
        changes = write_rows(editor, linears, rows)
        wide = call_with(editor, first, **changes, n=heads * depth)
    leading = group[0].order.leading or ()
    y = editor.call(aten.reshape.default, wide, [*leading, heads, depth], like=first, before=node)
    turned = sum(len(role.rows) for role in group if role.turn is not None)
    turn = group[0].turn
    if turn is not None:
        count = turned if turned < heads else -1
        y = editor.call(rotary.overload, y, *turn.args[1:4], count, turn.args[5], like=turn, before=node)
    changed = list(node.args)
    start = 0
    for role in group:
        changed[role.position], changed[6 + role.position] = y, start
        start += len(role.rows)
    new = editor.call(attention.overload, *changed, like=node)
    facts = {"linears": len(linears), "features": heads * depth, "reordered": rows is not None}
    editor.applied(new, f"{names} are heads of one linear", **facts)
    editor.replace(node, new)
    return new


def _rows(editor: Editor, linears: list[fx.Node], group: list[_Role]) -> PackedRows | str | None:
    """The wider linear's rows, None where one linear already has them in this order, or why there are none."""
    offsets, total = {}, 0
    for linear in linears:
        offsets[linear] = total
        total += arguments(linear)["n"]
    index = torch.cat([offsets[role.order.linear] + role.rows.flatten() for role in group])
    if len(linears) == 1 and torch.equal(index, torch.arange(total)):
        return None
    parts = []
    for linear in linears:
        part = read_rows(editor, linear)
        if part is None:
            return f"a tensor of {linear.name} is not a constant"
        parts.append(part)
    rows = concatenate(parts)
    return rows if isinstance(rows, str) else rows.select(index)


def _report_apart(editor: Editor) -> None:
    readers: dict[tuple[object, ...], list[fx.Node]] = {}
    for linear in editor.calls(*LINEARS):
        readers.setdefault(inputs(linear), []).append(linear)
    for linears in readers.values():
        if len(linears) > 1:
            reason = "read one value, but do not meet in an attention: a wider one would have to be sliced"
            editor.refused(linears[0], f"{', '.join(n.name for n in linears)} {reason}")
