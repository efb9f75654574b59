"""Transforms as values: a change of basis of one space that can be applied, inverted and composed.

Each acts on channels as a column vector, ``v' = M v``, with float64 tensors. `copies` of a space (heads) each have
their own when the tensors have leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """v'[i] = v[order[i]]; order int64 `[n]`."""

    order: Tensor

    def matrix(self) -> Tensor:
        """float64 `[n, n]`."""
        return torch.eye(len(self.order), dtype=torch.float64)[self.order]

    def apply(self, v: Tensor) -> Tensor:
        """Channels in the last dimension."""
        return v[..., self.order]

    def inverse(self) -> Permutation:
        """The permutation that undoes it."""
        return Permutation(torch.argsort(self.order))

    def then(self, other: Permutation) -> Permutation:
        """First this one, then the other."""
        return Permutation(self.order[other.order])


@dataclass(frozen=True)
class Scale:
    """v' = s * v; s positive, `[..., n]`."""

    factors: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """Channels in the last dimension."""
        return v * self.factors

    def inverse(self) -> Scale:
        """Division by the factors."""
        return Scale(self.factors.reciprocal())

    def then(self, other: Scale) -> Scale:
        """First this one, then the other."""
        return Scale(self.factors * other.factors)


@dataclass(frozen=True)
class Shift:
    """v' = v + z; z `[..., n]`."""

    offset: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """Channels in the last dimension."""
        return v + self.offset

    def inverse(self) -> Shift:
        """Subtraction of the offset."""
        return Shift(-self.offset)

    def then(self, other: Shift) -> Shift:
        """First this one, then the other."""
        return Shift(self.offset + other.offset)


@dataclass(frozen=True)
class Orthogonal:
    """v' = Q v; Q orthogonal, `[..., n, n]`."""

    rotation: Tensor

    def matrix(self) -> Tensor:
        """Q itself."""
        return self.rotation

    def apply(self, v: Tensor) -> Tensor:
        """Channels in the last dimension."""
        return (self.rotation @ v[..., None])[..., 0]

    def inverse(self) -> Orthogonal:
        """The transpose."""
        return Orthogonal(self.rotation.mT)

    def then(self, other: Orthogonal) -> Orthogonal:
        """First this one, then the other."""
        return Orthogonal(other.rotation @ self.rotation)


def random_orthogonal(n: int, generator: torch.Generator, copies: tuple[int, ...] = ()) -> Tensor:
    """Haar-distributed orthogonal matrices, float64 `[*copies, n, n]`."""
    q, r = torch.linalg.qr(torch.randn(*copies, n, n, dtype=torch.float64, generator=generator))
    return q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[..., None, :]


def pair_matrix(angle: Tensor, scale: Tensor, interleaved: bool) -> Tensor:
    """One complex number for each rotary pair as a real matrix: angle and scale `[..., n / 2]` → `[..., n, n]`."""
    half = angle.shape[-1]
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    matrix = torch.zeros(*angle.shape[:-1], 2 * half, 2 * half, dtype=angle.dtype)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    matrix[..., first, first] = cos
    matrix[..., second, second] = cos
    matrix[..., first, second] = -sin
    matrix[..., second, first] = sin
    return matrix


def fixing_ones(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix that keeps the vector of ones, float64 `[n, n]`."""
    ones = torch.ones(n, 1, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([ones, torch.eye(n, dtype=torch.float64)[:, 1:]], 1))
    inner = random_orthogonal(n - 1, generator)
    block = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner)
    return basis @ block @ basis.mT
