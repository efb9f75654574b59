"""Channel spaces as JSON-like values, for people: what may change basis, how far, and what sets the bound.

    describe(analyse(program)) -> {summary, spaces, gains}

Used by `isofold inspect --spaces` and by the report of recipes that fold something.
"""

from __future__ import annotations

from typing import Any

from ..graph import Place, place_of
from .analysis import Gain, Member, Space, Spaces
from .atoms import Group, Reason

GROUP_WORDS: dict[Group, str] = {
    Group.NONE: "nothing",
    Group.PERMUTATION: "permutations",
    Group.FIX_ONES: "orthogonal that keeps the ones",
    Group.ORTHOGONAL: "orthogonal",
    Group.GENERAL: "general",
    Group.PAIR_ORTHOGONAL: "rotary pairs, rotations only",
    Group.PAIR: "rotary pairs",
}


def describe(spaces: Spaces) -> dict[str, Any]:
    """What the analysis found, as values that JSON can hold.

    summary: `{spaces, gains, foldable, free_scales, free_shifts}` (the last two count independent vectors).
    spaces: `{name, channels, group, copies, parameters: [{name, axis}], values, gains: [name], bound}` in the order of
        the graph; copies is the number of independent matrices (per head), values the number of intermediate results,
        bound the decisive reason `{group, why, module, node, source}`, None where no operator limits the space.
    gains: `{name, module, node, source, folds, kept}`; kept is the reason of those that stay, as bound.
    """
    gains = _gains(spaces)
    return {
        "summary": {
            "spaces": len(spaces.spaces),
            "gains": len(gains),
            "foldable": len(spaces.foldable),
            "free_scales": len(spaces.scales.free_roots()),
            "free_shifts": len(spaces.shifts.free_roots()),
        },
        "spaces": [_space(spaces, space) for space in spaces.spaces],
        "gains": gains,
    }


def _space(spaces: Spaces, space: Space) -> dict[str, Any]:
    inside = {member.node for member in space.parameters}
    names = [str(gain.parameter.target) for gain in spaces.gains if spaces.constant(gain.parameter) in inside]
    return {
        "name": space.name,
        "channels": space.size,
        "group": GROUP_WORDS[space.group],
        "copies": space.copies,
        "parameters": [_member(member) for member in space.parameters],
        "values": len({member.node for member in space.values}),
        "gains": list(dict.fromkeys(names)),
        "bound": _reason(space.bound[0]) if space.bound else None,
    }


def _member(member: Member) -> dict[str, Any]:
    return {"name": str(member.node.target), "axis": member.dim}


def _gains(spaces: Spaces) -> list[dict[str, Any]]:
    kept = dict(spaces.kept)
    return [_gain(gain, kept.get(gain)) for gain in spaces.gains]


def _gain(gain: Gain, reason: Reason | None) -> dict[str, Any]:
    return {
        "name": str(gain.parameter.target),
        **vars(place_of(gain.node)),
        "folds": reason is None,
        "kept": None if reason is None else _reason(reason),
    }


def _reason(reason: Reason) -> dict[str, Any]:
    place = reason.place or Place("", "")
    return {"group": GROUP_WORDS[reason.group], "why": reason.why, **vars(place)}
