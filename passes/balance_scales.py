"""Put every free scale where the parameters' norms are least: one gauge for all programs that compute the same.

    minimize  sum over writers |W_w diag(s)|^2 + sum over readers |W_r diag(1/s)|^2     →     s^4 = readers / writers

elementwise, with the squared norms of what is scaled up by each channel and of what is scaled down. Why: a trained
model stands somewhere on the orbit of its scales, and where it stands decides what rounding costs: outlier channels
moved between two layers change nothing in float and ruin four bits. The least norm is unique on the orbit, so two
models that differ by scales come out equal. Roots that share equations are balanced in turn until nothing moves.

Norms' gains are left out (fold_norm_affine takes them away); a channel that is zero on one side keeps its scale.

REAL: computed in float64 and rounded once.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from ..compiler.editor import Editor
from ..compiler.graph import place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import Spaces, analyse
from ..compiler.spaces.change import Axis, Root, apply_factors, by_blocks, pairs_tied
from ..compiler.spaces.potentials import Key

_ROUNDS = 20
_ELEMENTS_AT_ONCE = 1 << 20
"""Elements of a parameter that are squared in float64 at a time."""


@define_pass(Guarantee.REAL)
def balance_scales(editor: Editor) -> None:
    """Balance all free scales of the program."""
    spaces = analyse(editor.program)
    free, expressed = spaces.scales.parametrize(spaces.scales.free_roots())
    gains = _gains(spaces)
    free = [root for root in free if root not in gains]
    if not free:
        return
    powers = _powers(spaces, expressed)
    logs = {
        root: torch.zeros([a.size for a in spaces.scales.ordered_support(root)], dtype=torch.float64)
        for root in free
    }
    for _ in range(_ROUNDS):
        if max(_balance(root, logs, powers, expressed) for root in free) < 1e-6:
            break
    moved = {root: _tied(spaces, root, value).exp() for root, value in logs.items()}
    names = apply_factors(editor, spaces, moved)
    for root, factors in moved.items():
        editor.applied(
            place_of(root[0].node if root[0].node.op != "get_attr" else next(iter(root[0].node.users))),
            f"{factors.numel()} scales balanced, {float(factors.min()):.3g} to {float(factors.max()):.3g}",
            parameters=len(names),
        )


def _gains(spaces: Spaces) -> set[Root]:
    """Roots of the vectors of gains."""
    return {
        spaces.scales.find((spaces.key(g.parameter), b))[0]
        for g in spaces.gains
        for b in spaces.scales.blocks(spaces.key(g.parameter))
    }


def _powers(
    spaces: Spaces, expressed: dict[Root, dict[Root, Fraction]]
) -> dict[Root, list[tuple[Root, int, Tensor]]]:
    """For each parametrizing root: (root of a parameter's vector, its sign there, squared norms over the support)."""
    found: dict[Root, list[tuple[Root, int, Tensor]]] = {}
    solution = spaces.scales
    for key in solution.ordered_keys():
        if key.node.op != "get_attr" or key.use is not None:
            continue
        held = spaces.program.tensors[str(key.node.target)]
        dims = spaces.dims_of[key.node]

        def collect(view: Tensor, axes: list[Axis], key: Key = key) -> Tensor:
            inside = spaces.axes(key)
            chosen = [(at, atom) for at, (atom, _, dim) in enumerate(axes) if dim in inside]
            root, sign = solution.find((key, frozenset(a for _, a in chosen)))
            terms = expressed.get(root)
            if terms:
                support = solution.ordered_support(root)
                places = [next(at for at, atom in chosen if atom is a) for a in support]
                norms = _squared_norms(view, places)
                for source in terms:
                    found.setdefault(source, []).append((root, sign, norms))
            return view

        by_blocks(held, dims, collect)
    return found


def _squared_norms(view: Tensor, places: list[int]) -> Tensor:
    """Sums of squares over all axes but `places`, whose order the result has; float64, of a part at a time."""
    rest = [i for i in range(view.dim()) if i not in places]
    kept = sorted(places)
    longest = max(range(view.dim()), key=lambda i: view.shape[i])
    at_once = max(1, _ELEMENTS_AT_ONCE * view.shape[longest] // max(view.numel(), 1))
    squares = (part.double().square() for part in view.split(at_once, longest))
    sums = [square.sum(rest) if rest else square for square in squares]
    total = torch.cat(sums, kept.index(longest)) if longest in kept else torch.stack(sums).sum(0)
    return total.permute([kept.index(i) for i in places])


def _balance(
    root: Root,
    logs: dict[Root, Tensor],
    powers: dict[Root, list[tuple[Root, int, Tensor]]],
    expressed: dict[Root, dict[Root, Fraction]],
) -> float:
    """One step in one root with the others held; the largest change of a log-scale."""
    up, down = torch.zeros_like(logs[root]), torch.zeros_like(logs[root])
    for of, sign, norms in powers.get(root, []):
        exponent = torch.zeros_like(norms)
        for source, coefficient in expressed[of].items():
            if source in logs:
                exponent = exponent + float(coefficient) * sign * logs[source]
        direction = float(expressed[of][root]) * sign
        now = norms * torch.exp(2 * exponent)
        if direction > 0:
            up += now
        else:
            down += now
    both = (up > 0) & (down > 0)
    step = torch.where(
        both, torch.log(down.clamp(min=1e-300) / up.clamp(min=1e-300)) / 4, torch.zeros_like(up)
    )
    logs[root] += step
    return float(step.abs().max()) if step.numel() else 0.0


def _tied(spaces: Spaces, root: Root, value: Tensor) -> Tensor:
    for axis, atom in enumerate(spaces.scales.ordered_support(root)):
        value = pairs_tied(value, axis, atom)
    return value
