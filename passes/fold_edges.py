"""Scales and shifts of sites go into what writes their values, as far as the equations allow; the edge keeps the rest.

    Q((x - z) / s)   with x' = (x - z) / s written by the producer itself: nothing is left to do at run time

Why: a site's vectors are a point in the solution space of the scale and shift equations (compiler/spaces/potentials.py)
or they are not. Where they are (a norm's output that only these readers see, values of attention, the factor of a gated
product), the producers absorb them. Where rows of a group share a scale (grouped queries), the shared part is absorbed,
and what is left over stays on the edge if it is worth its multiplication.

A norm whose gain was folded away takes the vectors back as its gain and bias when the edge is its only reader
(`absorb_into_norms`).

REAL: computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..compiler.editor import Editor
from ..compiler.graph import argument, only_user, place_of
from ..compiler.passes import Guarantee, PassResult, define_pass
from ..compiler.program import Program
from ..compiler.recipe import Recipe
from ..compiler.spaces.analysis import analyse
from ..compiler.spaces.change import Assignment, apply_factors, apply_shifts
from .fold_scale import channel_key, realisable
from .sites import EdgeTransform, find_sites

aten = torch.ops.aten

WORTH = 0.02
"""A remaining scale within this of one, in its logarithm, is dropped."""


@define_pass(Guarantee.REAL)
def fold_edges(
    editor: Editor, *, recipe: Recipe, transforms: Mapping[str, EdgeTransform], rest: dict[str, EdgeTransform]
) -> None:
    """Apply what is free of `transforms` (by site); what remains for the edges is put into `rest`."""
    program = editor.program
    sites = {site.name: site for site in find_sites(program, recipe)}
    shifted = _fold_shifts(editor, transforms, {name: site.value for name, site in sites.items()})
    # Scales are applied after the shifts, and to the biases that those made: the program between is analysed anew.
    sizes = {name: sum(reader.weight.numel() for reader in site.readers) for name, site in sites.items()}
    _fold_scales(editor, transforms, {name: site.value for name, site in sites.items()}, sizes, shifted, rest)


def _fold_shifts(
    editor: Editor, transforms: Mapping[str, EdgeTransform], values: Mapping[str, str]
) -> set[str]:
    spaces = analyse(editor.program)
    by_value = {}
    for name, transform in transforms.items():
        if transform.shift is not None and name in values and values[name] not in by_value:
            by_value[values[name]] = (name, -transform.shift)
    if not by_value:
        return set()
    chosen, reasons = realisable(spaces, spaces.shifts, {value: z for value, (_, z) in by_value.items()})
    nodes = {node.name: node for node in spaces.program.graph.nodes}
    done = set()
    for value, reason in reasons.items():
        site = by_value[value][0]
        if reason is None:
            done.add(site)
            editor.applied(place_of(nodes[value]), "its shift is folded into what writes it")
        else:
            editor.refused(place_of(nodes[value]), f"the shift stays on the edge: {reason}")
    apply_shifts(editor, spaces, chosen)
    return done


def _fold_scales(
    editor: Editor,
    transforms: Mapping[str, EdgeTransform],
    values: Mapping[str, str],
    sizes: Mapping[str, int],
    shifted: set[str],
    rest: dict[str, EdgeTransform],
) -> None:
    spaces = analyse(editor.finish() if shifted else editor.program)
    nodes = {node.name: node for node in spaces.program.graph.nodes}
    by_value: dict[str, tuple[str, Tensor]] = {}
    for name, transform in transforms.items():
        # A shift that stays on the edge would have to be scaled with the value; keep both there then.
        free = transform.shift is None or name in shifted
        if transform.scale is not None and free and name in values and values[name] not in by_value:
            by_value[values[name]] = (name, -transform.scale.double().log())
    # Where several sites want one scale (a router's and its experts', in front of which rows are repeated), the one
    # with the most weights gets it.
    wanted = sorted(by_value.items(), key=lambda entry: -sizes[entry[1][0]])
    chosen, reasons = realisable(spaces, spaces.scales, {value: s for value, (_, s) in wanted})
    realised: dict[str, Tensor] = {}
    if chosen:
        assignment = Assignment(spaces.scales, {root: v.exp() for root, v in chosen.items()}, multiply=True)
        for value in reasons:
            found = channel_key(spaces, spaces.scales, nodes[value])
            if not isinstance(found, str):
                factor = assignment.over(*found)
                if factor is not None:
                    realised[by_value[value][0]] = factor.reshape(-1, factor.shape[-1])[0]
        apply_factors(editor, spaces, {root: v.exp() for root, v in chosen.items()})
    for value, reason in reasons.items():
        if reason is None:
            editor.applied(place_of(nodes[value]), "its scale is folded into what writes it")
        else:
            editor.refused(place_of(nodes[value]), f"the scale stays on the edge: {reason}")
    for name, transform in transforms.items():
        left = transform.scale
        if name in realised and left is not None:
            left = left.double() * realised[name]
            left = left if float(left.log().abs().max()) > WORTH else None
        shift = None if name in shifted else transform.shift
        rest[name] = replace(transform, scale=left, shift=shift)


@define_pass(Guarantee.REAL)
def absorb_into_norms(editor: Editor) -> None:
    """`norm(x, None) [- z] * r`, read by nothing else, becomes a norm with gain r and bias -z r."""
    for norm in editor.calls(aten.rms_norm.default, aten.layer_norm.default):
        layer = norm.target is aten.layer_norm.default
        if argument(norm, "weight") is not None or (layer and argument(norm, "bias") is not None):
            continue
        last, z, r = _vectors(editor, norm)
        if last is norm or r is None or (z is not None and not layer):
            continue
        gain = editor.constant(r, f"{norm.name}_gain")
        x, shape, eps = (argument(norm, name) for name in ("input", "normalized_shape", "eps"))
        if layer:
            bias = editor.constant(
                torch.zeros_like(r) if z is None else (-(z.double() * r.double())).to(r.dtype),
                f"{norm.name}_bias",
            )
            new = editor.call(norm.target, x, shape, gain, bias, eps, like=norm, before=norm.next)
        else:
            new = editor.call(norm.target, x, shape, gain, eps, like=norm, before=norm.next)
        editor.applied(norm, "the scale on the edge behind it is its gain")
        editor.replace(last, new)


def _vectors(editor: Editor, norm: fx.Node) -> tuple[fx.Node, Tensor | None, Tensor | None]:
    """The last node of `[- z] [* r]` behind a norm, with the vectors."""
    node, z, r = norm, None, None
    for target in (aten.sub.Tensor, aten.mul.Tensor):
        user = only_user(node)
        if user is None or user.target is not target or user.args[0] is not node:
            continue
        held = editor.tensor(user.args[1])
        if held is None or held.dim() != 1:
            continue
        z, r = (held, r) if target is aten.sub.Tensor else (z, held)
        node = user
    return node, z, r


def run_fold_edges(
    program: Program, recipe: Recipe, transforms: Mapping[str, EdgeTransform]
) -> tuple[PassResult, dict[str, EdgeTransform]]:
    """`fold_edges`, and what it left."""
    rest: dict[str, EdgeTransform] = {}
    return fold_edges(program, recipe=recipe, transforms=transforms, rest=rest), rest
