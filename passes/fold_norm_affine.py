"""Fold the gains and biases of norms (and other gains) into what reads them.

    W ((N(x) * g + c)) + b  =  (W diag(g)) N(x) + (b + W c)

Why: a gain is a scale of the norm's output and a bias a shift of it; the linears that read the output absorb both.
Side conditions, all from the equations of the channel spaces and none from names: the output is read only by what
absorbs a scale (else it is pinned: a residual sum of a post-norm model), no two gains take the same freedom (an
embedding tied with the head holds the last gain), no gain lies on rotary pairs, and no gain is zero. Afterwards the
norm is `N(x)` alone and commutes with rotations.

REAL: computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..compiler.editor import Editor
from ..compiler.graph import argument
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import Gain, Spaces, analyse
from ..compiler.spaces.change import Root, apply_factors, apply_shifts, project

aten = torch.ops.aten


@define_pass(Guarantee.REAL)
def fold_norm_affine(editor: Editor) -> None:
    """Gains become one and biases zero, and both leave the graph."""
    spaces = analyse(editor.program)
    nodes = {node.name: node for node in editor.graph.nodes}
    gains = []
    factors: dict[Root, Tensor] = {}
    for gain in spaces.foldable:
        held = editor.tensors[str(gain.parameter.target)].double()
        if (held == 0).any():
            editor.refused(nodes[gain.node.name], f"{int((held == 0).sum())} channels of its gain are zero")
            continue
        gains.append(gain)
        factors |= _roots(spaces, gain, held)
    for gain, reason in spaces.kept:
        place = f" ({reason.place})" if reason.place is not None else ""
        editor.refused(nodes[gain.node.name], f"its gain cannot be folded: {reason.why}{place}")
    apply_factors(editor, spaces, factors)
    biases = _foldable_biases(editor, spaces, gains)
    apply_shifts(editor, spaces, {root: value for _, found in biases for root, value in found.items()})
    without_bias = {gain.node.name for gain, _ in biases}
    for gain in gains:
        _remove(editor, nodes[gain.node.name], gain, gain.node.name in without_bias)


def _roots(spaces: Spaces, gain: Gain, held: Tensor) -> dict[Root, Tensor]:
    """1 / gain, by root; the sign of a gain goes along."""
    key = spaces.key(gain.parameter)
    dims = spaces.dims_of[gain.parameter]
    values = project(spaces.scales, key, dims, held)
    # `project` gives the vector of the root; a contravariant tie means the inverse there.
    result = {}
    for root, value in values.items():
        sign = next(
            spaces.scales.find((key, b))[1]
            for b in spaces.scales.blocks(key)
            if spaces.scales.find((key, b))[0] == root
        )
        result[root] = (value * sign).reciprocal() if sign > 0 else value * sign
    return result


def _foldable_biases(
    editor: Editor, spaces: Spaces, gains: list[Gain]
) -> list[tuple[Gain, dict[Root, Tensor]]]:
    """Biases of norms that can become zero together."""
    found: list[tuple[Gain, dict[Root, Tensor]]] = []
    wanted: list[Root] = []
    for gain in gains:
        bias = argument(gain.node, "bias") if gain.node.target is aten.layer_norm.default else None
        if bias is None:
            continue
        bias = spaces.constant(bias)
        key = spaces.key(bias)
        held = editor.tensors[str(bias.target)].double()
        values = project(spaces.shifts, key, spaces.dims_of[bias], -held)
        blocks = [spaces.shifts.find((key, block))[0] for block in spaces.shifts.blocks(key)]
        roots = list(values)
        free, _ = spaces.shifts.parametrize([*wanted, *(r for r in roots if r not in wanted)])
        if set(blocks) <= set(free) and not set(roots) & set(wanted):
            wanted.extend(roots)
            found.append((gain, values))
    return found


def _remove(editor: Editor, node: fx.Node, gain: Gain, without_bias: bool) -> None:
    if not gain.norm:
        parameter = gain.parameter.target
        x = next(a for a in node.args[:2] if isinstance(a, fx.Node) and a.target != parameter)
        editor.applied(node, "its gain is folded into what reads it")
        editor.replace(node, x)
        return
    x, shape, eps = (argument(node, name) for name in ("input", "normalized_shape", "eps"))
    if node.target is aten.layer_norm.default:
        bias = argument(node, "bias")
        node.args, node.kwargs = (x, shape, None, None, eps), {}
        if bias is not None and not without_bias:
            added = editor.call(aten.add.Tensor, node, bias, like=node, before=node.next)
            node.replace_all_uses_with(
                added, delete_user_cb=lambda user: user is not added, propagate_meta=False
            )
        what = "gain and bias folded" if without_bias else "gain folded"
    else:
        node.args, node.kwargs = (x, shape, None, eps), {}
        what = "gain folded"
    editor.applied(node, what)
