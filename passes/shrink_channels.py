"""Channels that contribute nothing are removed from every parameter of their space: a smaller dense model.

    writer  W' = W[keep], b' = b[keep]        reader  W' = W[:, keep]

An index of a channel space goes where each product over it meets a zero on one side, whatever the inputs: pruned rows
of a writer, pruned columns of a reader, whole heads (`compiler/spaces/removal.py` proves it and does it). Nothing
else is known about the model: grouped queries, fused projections, gated pairs, tied embeddings and convolutions
follow from the spaces.

Side conditions: a space that takes permutations, and operators on it that treat channels one by one; a LayerNorm over
it is refused. At least one channel stays. The report has the bytes, and the time that the cost model predicts for the
linears.

REAL: sums lose terms that are zero (an RMS norm's gain takes up the number of channels, rounded once).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.cost_model import Work, work_of, working_set
from ..compiler.editor import Editor
from ..compiler.graph import Place, argument, place_of
from ..compiler.machine import known_machine
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import Space, Spaces, analyse
from ..compiler.spaces.removal import dead_indices, kept, labels, reason_against, remove
from ..compiler.spaces.support import contracted

LINEAR: Any = torch.ops.aten.linear.default


@define_pass(Guarantee.REAL)
def shrink_channels(editor: Editor) -> None:
    """Remove all channels of all spaces that contribute nothing."""
    spaces = analyse(editor.program)
    dead = dead_indices(spaces, spaces.spaces)
    keep: dict[str, Tensor] = {}
    for space in spaces.spaces:
        gone = dead[space.name]
        if not bool(gone.any()):
            continue
        where, reason = place_of_space(space), reason_against(spaces, space)
        if reason is not None:
            editor.refused(
                where, f"{int(gone.sum())} of {space.size} channels contribute nothing, but {reason}"
            )
            continue
        if bool(gone.all()):
            gone = gone.clone()
            gone[0] = False
        if bool(gone.any()):
            keep[space.name] = ~gone
    if not keep:
        return
    facts = [_facts(spaces, space, keep[space.name]) for space in spaces.spaces if space.name in keep]
    remove(editor, spaces, keep)
    for where, what, entry in facts:
        editor.applied(where, what, **entry)


def place_of_space(space: Space) -> Place:
    """A reader of the space's first parameter."""
    return place_of(next(iter(space.parameters[0].node.users)))


def _facts(spaces: Spaces, space: Space, keep: Tensor) -> tuple[Place, str, dict[str, Any]]:
    left = int(keep.sum())
    saved, names = 0, []
    for node in dict.fromkeys(member.node for member in space.parameters):
        held = spaces.program.tensors[str(node.target)]
        stays = 1.0
        for dim in spaces.dims_of[node]:
            mask = kept(dim, {space.atom: keep}) if dim else torch.ones(1, dtype=torch.bool)
            stays *= float(mask.double().mean())
        saved += round(held.numel() * (1 - stays)) * held.element_size()
        names.append(str(node.target))
    before, after = _predicted(spaces, space, left / space.size)
    faster = f", predicted {1e6 * (before - after):.1f} µs faster" if before > after else ""
    what = (
        f"{space.size} → {left} channels in {len(names)} parameters ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}): {saved} bytes less{faster}"
    )
    facts = {
        "channels_before": space.size,
        "channels_after": left,
        "parameters": names,
        "bytes_saved": saved,
        "predicted_microseconds_saved": 1e6 * (before - after),
    }
    return place_of_space(space), what, facts


def _predicted(spaces: Spaces, space: Space, share: float) -> tuple[float, float]:
    """Predicted seconds of the linears that read or write the space, before and after."""
    machine, _ = known_machine()
    size = working_set(spaces.program.graph)
    before = after = 0.0
    for node in spaces.program.graph.nodes:
        work = work_of(node) if node.op == "call_function" and node.target == LINEAR else None
        if work is None:
            continue
        weight = spaces.constant(argument(node, "weight"))
        left = 1.0
        for dim in spaces.dims_of.get(weight, []):
            inside = float((labels(dim, space.atom) >= 0).double().mean()) if dim else 0.0
            left *= 1 - inside * (1 - share)
        smaller = Work(work.kind, work.rows, round(work.elements * left), round(work.weight_bytes * left))
        old, new = machine.predict(work, size), machine.predict(smaller, size)
        if left < 1 and old is not None and new is not None:
            before, after = before + old.seconds, after + new.seconds
    return before, after


def readers(spaces: Spaces, space: Space) -> list[tuple[fx.Node, fx.Node, int]]:
    """(call, operand, dimension) for every product that sums over the space with a parameter: its linears and
    convolutions."""
    found = []
    for node in spaces.program.graph.nodes:
        sides = contracted(node) if node.op == "call_function" else []
        if len(sides) < 2:
            continue
        operand, at = sides[0]
        dim = spaces.dims_of[spaces.constant(operand)][at]
        if bool((labels(dim, space.atom) >= 0).any()):
            found.append((node, operand, at))
    return found
