"""A random member of everything that the analysis allows: what a legal fold may do, all at once.

Used to prove an analysis on a model: whatever is drawn, the program must compute what it computed before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .analysis import Spaces
from .atoms import Group
from .change import Root, pairs_tied
from .potentials import Solution
from .transform import fixing_ones, pair_matrix, random_orthogonal


def random_bases(spaces: Spaces, generator: torch.Generator, size: float = 0.3) -> dict[str, Tensor]:
    """A matrix for each space whose group is larger than permutations, one for each of its copies.

    size: how far general matrices are from the identity, and logarithms of scales of pairs from zero.
    """
    found = {}
    for space in spaces.spaces:
        copies, n = tuple(atom.size for atom in space.varies), space.size
        if space.group == Group.ORTHOGONAL:
            found[space.name] = random_orthogonal(n, generator, copies)
        elif space.group == Group.GENERAL:
            noise = torch.randn(*copies, n, n, generator=generator, dtype=torch.float64)
            found[space.name] = torch.eye(n, dtype=torch.float64) + size * noise / n**0.5
        elif space.group == Group.FIX_ONES:
            found[space.name] = fixing_ones(n, generator)
        elif space.group in (Group.PAIR, Group.PAIR_ORTHOGONAL):
            angle = 6.28 * torch.rand(*copies, n // 2, generator=generator, dtype=torch.float64)
            scale = torch.exp(size * torch.randn(*copies, n // 2, generator=generator, dtype=torch.float64))
            if space.group == Group.PAIR_ORTHOGONAL:
                scale = torch.ones_like(scale)
            found[space.name] = pair_matrix(angle, scale, bool(space.atom.interleaved))
    return found


def random_orders(spaces: Spaces, generator: torch.Generator) -> dict[str, Tensor]:
    """A permutation for each space but rotary pairs."""
    return {
        space.name: torch.randperm(space.size, generator=generator)
        for space in spaces.spaces
        if space.group not in (Group.PAIR, Group.PAIR_ORTHOGONAL)
    }


def random_factors(spaces: Spaces, generator: torch.Generator, size: float = 0.3) -> dict[Root, Tensor]:
    """Positive factors for a set of scales that determines all others; logarithms are normal with deviation `size`."""
    return {root: v.exp() for root, v in _vectors(spaces.scales, generator, size).items()}


def random_shifts(spaces: Spaces, generator: torch.Generator, size: float = 0.3) -> dict[Root, Tensor]:
    """Shifts that determine all others."""
    return _vectors(spaces.shifts, generator, size)


def _vectors(solution: Solution, generator: torch.Generator, size: float) -> dict[Root, Tensor]:
    found = {}
    for root in solution.free_roots():
        support = solution.ordered_support(root)
        vector = size * torch.randn([a.size for a in support], generator=generator, dtype=torch.float64)
        for axis, atom in enumerate(support):
            vector = pairs_tied(vector, axis, atom)
        found[root] = vector
    return found
