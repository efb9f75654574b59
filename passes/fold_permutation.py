"""Reorder channels: every parameter of a space takes the permutation (structured pruning and act-order start here).

    writer  W' = W[p], b' = b[p]        reader  W' = W[:, p]

Why: a permutation commutes with everything that treats channels alike. It is legal in every space, also with gains
in place, except where channels are rotary pairs.

BITWISE in the parameters; the order of sums in the readers changes, so the program is REAL.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..compiler.editor import Editor
from ..compiler.graph import place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import analyse
from ..compiler.spaces.atoms import Group
from ..compiler.spaces.change import Axis, by_blocks


@define_pass(Guarantee.REAL)
def fold_permutation(editor: Editor, *, orders: Mapping[str, Tensor]) -> None:
    """orders: int64 `[n]`, a permutation of 0..n-1, by the space's name; v'[i] = v[order[i]]."""
    spaces = analyse(editor.program)
    for space in spaces.spaces:
        order = orders.get(space.name)
        if order is None:
            continue
        where = place_of(next(iter(space.parameters[0].node.users)))
        if space.group in (Group.PAIR, Group.PAIR_ORTHOGONAL):
            editor.refused(where, f"{space.name}: {space.bound[0].why}")
            continue
        if not torch.equal(torch.sort(order).values, torch.arange(space.size)):
            editor.refused(where, f"{space.name}: not a permutation of its {space.size} channels")
            continue

        def reorder(
            view: Tensor, axes: list[Axis], order: Tensor = order, atom: object = space.atom
        ) -> Tensor:
            for at, (axis, _, _) in enumerate(axes):
                if axis is atom:
                    view = view.index_select(at, order)
            return view

        names = {str(member.node.target): member.node for member in space.parameters}
        for name, node in names.items():
            held: Tensor = editor.tensors[name]
            editor.set_tensor(name, by_blocks(held, spaces.dims_of[node], reorder).contiguous())
        editor.applied(where, f"{space.name}: {space.size} channels reordered", parameters=list(names))
