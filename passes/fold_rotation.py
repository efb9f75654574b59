"""Turn channel spaces by given matrices: every parameter of a space takes them, the graph stays as it is.

    writer  W' = R W, b' = R b, E' = E R^T        reader  W' = W R^-1        so that  W_read R^-1 R x = W_read x

Why: everything between writers and readers commutes with the space's group (compiler/spaces). Side conditions: the
matrix is in that group: orthogonal where norms are kept, general for the values of attention and for keys and queries
without rotary embedding (where the two sides take T and T^-t), one complex number for each rotary pair before rotary
embedding; gains are folded before (fold_norm_affine). Anything else is refused with the operator that forbids it.

REAL: computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..compiler.editor import Editor
from ..compiler.graph import place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.spaces.analysis import Space, analyse
from ..compiler.spaces.atoms import Group
from ..compiler.spaces.change import apply_bases

_TOLERANCE = 1e-9


@define_pass(Guarantee.REAL)
def fold_rotation(editor: Editor, *, rotations: Mapping[str, Tensor]) -> None:
    """rotations: float64 `[n, n]`, or `[*sizes of space.varies, n, n]` (one for each head), by the space's name."""
    spaces = analyse(editor.program)
    chosen = {}
    for space in spaces.spaces:
        if space.name not in rotations:
            continue
        reason = reason_against(space, rotations[space.name])
        if reason is None:
            chosen[space.name] = rotations[space.name]
        else:
            editor.refused(place_of(space.parameters[0].node), f"{space.name}: {reason}")
    for space in apply_bases(editor, spaces, chosen):
        first = space.parameters[0].node
        readers = [str(member.node.target) for member in space.parameters]
        editor.applied(
            place_of(next(iter(first.users))),
            f"{space.name} of {space.size} channels turned in {len(readers)} parameters",
            parameters=readers,
        )


def reason_against(space: Space, matrix: Tensor) -> str | None:
    """Why a space cannot take a matrix, or None."""
    n = space.size
    sizes = tuple(atom.size for atom in space.varies)
    if tuple(matrix.shape) not in ((n, n), (*sizes, n, n)):
        several = f" or one for each of {sizes}" if sizes else ""
        return f"expected a matrix [{n}, {n}]{several}, got {list(matrix.shape)}"
    if space.gains:
        return f"{len(space.gains)} gains are not folded yet"
    why = space.bound[0].why if space.bound else ""
    identity = torch.eye(n, dtype=torch.float64)
    gram = matrix.double() @ matrix.double().mT
    orthogonal = float((gram - identity).abs().max()) < _TOLERANCE
    if space.group == Group.GENERAL:
        return None
    if space.group in (Group.PAIR, Group.PAIR_ORTHOGONAL):
        return _reason_against_pairs(space, matrix.double(), orthogonal)
    if not orthogonal:
        return f"not orthogonal, and {why}"
    if space.group == Group.FIX_ONES and float((matrix.double().sum(-1) - 1).abs().max()) > _TOLERANCE * n:
        return f"does not keep the vector of ones, and {why} (center the writers first)"
    if space.group == Group.PERMUTATION and not bool(((matrix == 0) | (matrix == 1)).all()):
        return f"no permutation, and {why}"
    return None


def _reason_against_pairs(space: Space, matrix: Tensor, orthogonal: bool) -> str | None:
    n = space.size
    if space.group == Group.PAIR_ORTHOGONAL and not orthogonal:
        return f"not orthogonal, and {space.bound[0].why}"
    half = n // 2
    first = torch.arange(half) * 2 if space.atom.interleaved else torch.arange(half)
    second = first + (1 if space.atom.interleaved else half)
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for rows, columns in ((first, first), (first, second), (second, first), (second, second)):
        pairs[rows, columns] = True
    if float(matrix.masked_select(~pairs).abs().sum()) > _TOLERANCE * n:
        return f"mixes rotary pairs, and {space.bound[0].why}"
    equal = (matrix[..., first, first] - matrix[..., second, second]).abs()
    opposite = (matrix[..., first, second] + matrix[..., second, first]).abs()
    if float((equal + opposite).max()) > _TOLERANCE * n:
        return f"no rotation and scale inside a rotary pair, and {space.bound[0].why}"
    return None
