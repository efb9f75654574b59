"""A rotation for every space that takes one: randomised Hadamard, or WOMI.

    hadamard   R = diag(random signs) H                      QuaRot (arXiv 2404.00456)
    womi       R = H' V^T, V the eigenvectors of the readers' covariance, H' a randomised Hadamard matrix
               OSTQuant (arXiv 2501.13987): all channels get the same variance, and it is spread besides

The residual stream, the values of each head and queries with keys where nothing but a contraction lies between take a
full rotation. Rotary pairs have one angle each, which averages nothing and is left to learning. A Hadamard matrix has
entries of one magnitude, so a single outlier channel ends up as 1 / sqrt(n) everywhere.

Matrices act on channels as a column vector, v' = R v, float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..compiler.dialect import linear_grouped
from ..compiler.graph import argument
from ..compiler.hadamard import randomised_hadamard
from ..compiler.spaces.analysis import Member, Space, Spaces
from ..compiler.spaces.atoms import Group
from ..compiler.spaces.change import Axis, by_blocks

aten = torch.ops.aten


def turning(spaces: Spaces) -> list[Space]:
    """The spaces that take a full rotation, gains folded."""
    full = (Group.ORTHOGONAL, Group.GENERAL)
    return [space for space in spaces.spaces if space.group in full and not space.gains]


@torch.no_grad()
def choose_rotations(spaces: Spaces, method: str, seed: int = 0) -> dict[str, Tensor]:
    """Matrices `[n, n]` or `[*sizes of space.varies, n, n]` by the space's name; method `hadamard | womi`."""
    chosen = {}
    for index, space in enumerate(turning(spaces)):
        mixed = randomised_hadamard(space.size, seed + index).mT
        if method == "womi":
            mixed = mixed @ reader_basis(spaces, space).mT
        chosen[space.name] = mixed
    return chosen


def _reads_along(user: fx.Node, member: Member) -> bool:
    """Whether a linear sums over a dimension of its weight."""
    inputs = {aten.linear.default: 1, linear_grouped.overload: 2}
    return any(
        user.target is target and member.dim == dim and argument(user, "weight") is member.node
        for target, dim in inputs.items()
    )


@torch.no_grad()
def reader_basis(spaces: Spaces, space: Space) -> Tensor:
    """Eigenvectors (columns) of the covariance of the readers' weights over the space's channels.

    One for each copy of the space; rows of all readers are stacked, and their mean is removed. Float64.
    """
    sizes = [atom.size for atom in space.varies]
    n = space.size
    total = torch.zeros(*sizes, n, n, dtype=torch.float64)
    first = torch.zeros(*sizes, n, dtype=torch.float64)
    count = 0
    for member in space.parameters:
        if not any(_reads_along(user, member) for user in member.node.users):
            continue
        rows: list[Tensor] = []

        def collect(view: Tensor, axes: list[Axis], rows: list[Tensor] = rows) -> Tensor:
            atoms = [a for a, _, _ in axes]
            if space.atom in atoms:
                order = [atoms.index(a) for a in (*space.varies, space.atom)]
                rest = [i for i in range(len(atoms)) if i not in order]
                rows.append(
                    view.permute([*rest, *order]).flatten(0, len(rest) - 1)
                    if rest
                    else view.permute(order)[None]
                )
            return view

        by_blocks(
            spaces.program.tensors[str(member.node.target)].double(), spaces.dims_of[member.node], collect
        )
        for found in rows:
            total += torch.einsum("r...i,r...j->...ij", found, found)
            first += found.sum(0)
            count += len(found)
    mean = first / max(count, 1)
    covariance = total / max(count, 1) - mean[..., :, None] * mean[..., None, :]
    return torch.linalg.eigh(covariance).eigenvectors
