"""Scale values by given vectors where their parameters absorb it.

    x' = s x:   writer rows * s, gain and bias * s,   reader columns / s

Why: log-scales satisfy linear equations over the graph (compiler/spaces/potentials.py); a vector is given for some
values, all else follows, and what is free besides stays one. Side conditions: the value's scale is free (not pinned
by an activation function, a norm's input, a residual sum that is), equal inside rotary pairs and over the queries of a
group: a vector that differs there is replaced by its geometric mean.

REAL: computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..compiler.editor import Editor
from ..compiler.graph import place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import Spaces, analyse
from ..compiler.spaces.atoms import Dim, leaves, size_of
from ..compiler.spaces.change import Root, apply_factors, project
from ..compiler.spaces.potentials import Key, Solution


@define_pass(Guarantee.REAL)
def fold_scale(editor: Editor, *, scales: Mapping[str, Tensor]) -> None:
    """scales: positive float64 `[channels]` by the name of a node, for its last dimension: x' = s * x."""
    spaces = analyse(editor.program)
    nodes = {node.name: node for node in spaces.program.graph.nodes}
    chosen, names = realisable(
        spaces, spaces.scales, {name: torch.log(s.double()) for name, s in scales.items()}
    )
    for name, reason in names.items():
        if reason is not None:
            editor.refused(place_of(nodes[name]), reason)
    changed = apply_factors(editor, spaces, {root: torch.exp(v) for root, v in chosen.items()})
    if changed:
        done = [name for name, reason in names.items() if reason is None]
        editor.applied(
            place_of(nodes[done[0]]), f"{len(done)} values scaled", values=done, parameters=changed
        )


def realisable(
    spaces: Spaces, solution: Solution, wanted: Mapping[str, Tensor]
) -> tuple[dict[Root, Tensor], dict[str, str | None]]:
    """Values of independent roots that realise vectors (logarithms for scales), and for each node None or a reason."""
    chosen: dict[Root, Tensor] = {}
    reasons: dict[str, str | None] = {}
    nodes = {node.name: node for node in spaces.program.graph.nodes}
    for name, vector in wanted.items():
        found = channel_key(spaces, solution, nodes[name])
        if isinstance(found, str):
            reasons[name] = found
            continue
        key, dims = found
        values = project(solution, key, dims, vector.expand([size_of(dim or ()) for dim in dims]))
        fresh = {root: v for root, v in values.items() if root not in chosen}
        free, _ = solution.parametrize([*chosen, *fresh])
        if not fresh or not set(fresh) <= set(free):
            reasons[name] = f"its {solution.what} follows from those already chosen"
            continue
        chosen |= fresh
        reasons[name] = None
    return chosen, reasons


def channel_key(spaces: Spaces, solution: Solution, node: fx.Node) -> tuple[Key, list[Dim]] | str:
    """A value's key and what its vector is over, channels last, where that is the channels and what rows carry, or why
    it has none."""
    pin = solution.pin_of(spaces.key(node)) if solution.knows(spaces.key(node)) else None
    if pin is not None:
        place = f" ({pin.place})" if pin.place is not None else ""
        return f"its {solution.what} is pinned: {pin.why}{place}"
    key = spaces.key(node)
    dims = spaces.vector_dims(node)
    channels = {atom for dim in (dims[0], dims[-1]) for atom, _ in leaves(dim)}
    for block in solution.blocks(key):
        root, _ = solution.find((key, block))
        if not set(solution.ordered_support(root)) <= channels:
            return f"its {solution.what} is not one vector of channels"
    return key, dims
