"""Rotations, scales and shifts that make a quadratic model of the rounding's loss least, in closed form but for R.

A site's readers see A x; rounding adds to each channel of A x noise in proportion to the energy of the row, and to each
element of W A^-1 in proportion to that of its row. With S the covariance of x, F the curvature of the loss there
(`site_curvature`) and G that behind a reader, the loss that both add is

    1/2 tr(A S A^T) / n * tr(A^-T F' A^-1),     F' = k_a F + sum over readers of k_w W^T diag(G) W

k_a, k_w: squared error of rounded values relative to their energy. With A a rotation it is tr S tr F' / 2n whatever the
rotation: this is what a Hadamard matrix leaves, and why all random ones leave the same. With A = H D R, H a Hadamard
transform in the graph, the best scales are D_i^4 = F'_ii / S_ii in the basis of R, and leave

    1/2n (sum_i sqrt(S_ii F'_ii))^2

which is least where R finds directions that the loss feels and values do not fill, or the other way round. All sites
that read one space share R; it is found on the Stiefel manifold, together with what the rounded rows of the space's
writers W cost, k_w tr(S_in) / 2 n_in * sum_i (R W W^T R^T)_ii (R G R^T)_ii. A general A would leave
(tr (S^1/2 F' S^1/2)^1/2)^2 / 2n, which bounds what any transform can do.

Shifts are the means: what is left to round has the least energy. Values of attention keep Hadamard matrices: the best
invertible one for each head would gain less than a fiftieth of the whole where it was computed (benchmarks/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.graph import argument
from ..compiler.hadamard import apply_hadamard
from ..compiler.hadamard_orders import factor
from ..compiler.program import Program
from ..compiler.recipe import Fold
from ..compiler.spaces.analysis import Space, Spaces
from ..compiler.spaces.atoms import Dim, Group, flatten, leaves, new
from ..compiler.spaces.change import rotated
from .choose_rotations import choose_rotations, turning
from .site_curvature import SiteCurvature, measure_curvature
from .sites import EdgeTransform, Reader, Site
from .stiefel import RiemannianAdam

STEPS, RATE = 100, 0.03
"""Of the search for a rotation: its steps, and the angle by which one turns each channel at first."""

FP8_NOISE = 6.6e-4
"""Squared error of E4M3 relative to the energy, measured on normal values, whatever their number (a test)."""

FLOOR = 1e-6
"""Of the mean: less variance or curvature in a channel is taken as that."""


@dataclass(frozen=True)
class Chosen:
    """Matrices by the space's name, and the transform of each site that has curvature, by its name."""

    rotations: dict[str, Tensor]
    edges: dict[str, EdgeTransform]


@dataclass(frozen=True)
class _Readers:
    """One site in its own basis: S and F' of its values."""

    site: Site
    dim: Dim
    mean: Tensor
    covariance: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class _Writer:
    """One linear that writes a space: W W^T times its noise, and G."""

    energy: Tensor
    curvature: Tensor


def choose_by_curvature(
    program: Program,
    spaces: Spaces,
    sites: Sequence[Site],
    fold: Fold,
    calibration: Iterable[Any],
    *,
    hadamard: Collection[str],
) -> Chosen:
    """Transforms for a canonical program; hadamard: names of the sites that get a transform online, and so a scale."""
    measured = measure_curvature(program, sites, calibration, fold.seed)
    nodes = {node.name: node for node in program.graph.nodes}
    readers = [
        _readers(site, measured[site.name], spaces.dims_of[nodes[site.value]][-1], fold)
        for site in sites
        if site.name in measured and measured[site.name].gradient.rows
    ]
    rotations = choose_rotations(spaces, "hadamard", fold.seed) if fold.rotation != "none" else {}
    if fold.rotation == "learned":
        for space in turning(spaces):
            inside = [r for r in readers if r.site.name in hadamard and _is_whole(r.dim, space)]
            if space.group == Group.ORTHOGONAL and not space.varies and inside:
                rotations[space.name] = _best_rotation(inside, _writers(spaces, space, sites, measured))
    edges = {r.site.name: _edge(r, spaces, rotations, fold, scaled=r.site.name in hadamard) for r in readers}
    return Chosen(rotations, edges)


def activation_noise(bits: int, channels: int) -> float:
    """Squared error of dynamic ranges for normal values, relative to their energy: (range / levels)^2 / 12."""
    # The expected largest of n normal values, by Blom's quantile: within 3 % from 16 on.
    largest = float(torch.special.ndtri(torch.tensor((channels - 0.375) / (channels + 0.25)).double()))
    return (2 * largest / (2**bits - 1)) ** 2 / 12


def weight_noise(reader: Reader) -> float:
    """Squared error of the rounded weight relative to its energy, once a Hadamard matrix has spread it."""
    weight = reader.weight.float().flatten(1)
    spread = apply_hadamard(weight, factor(weight.shape[1])).reshape(reader.weight.shape).contiguous()
    error = reader.rounded(spread) - spread
    return float(error.square().sum() / spread.square().sum().clamp(min=1e-30))


def _readers(site: Site, measured: SiteCurvature, dim: Dim, fold: Fold) -> _Readers:
    noise = 0.0
    if site.activations.mode != "float":
        fp8 = site.activations.format == "e4m3"
        noise = FP8_NOISE if fp8 else activation_noise(site.bits, site.channels)
    curvature = measured.gradient.square * noise
    for reader in site.readers:
        weight = reader.weight.double().flatten(1)
        felt = measured.felt[reader.node]
        curvature = curvature + weight_noise(reader) * (weight.mT * felt) @ weight
    value = measured.value
    shifted = fold.shift == "learned" and site.shift_refusal is None
    return _Readers(site, dim, value.mean, value.covariance() if shifted else value.square, curvature)


def _is_whole(dim: Dim, space: Space) -> bool:
    """Whether a dimension is the space's own channels and nothing else."""
    return [atom for atom, _ in flatten(dim or ())] == [space.atom]


def _writers(
    spaces: Spaces, space: Space, sites: Sequence[Site], measured: dict[str, SiteCurvature]
) -> list[_Writer]:
    nodes = {node.name: node for node in spaces.program.graph.nodes}
    found = []
    for site in sites:
        for reader in site.readers:
            weight = spaces.constant(argument(nodes[reader.node], "weight"))
            dims = spaces.dims_of.get(weight)
            rows = 1 if reader.experts else 0
            if site.name not in measured or dims is None or not _is_whole(dims[rows], space):
                continue
            behind = measured[site.name].outputs[reader.node]
            if behind.rows and reader.weight.dim() == 2:
                # Experts as if each were chosen as often.
                w = reader.weight.double().unflatten(0, (reader.experts or 1, -1))
                square = (w @ w.mT).mean(0)
                energy = float(measured[site.name].value.square.trace()) / site.channels
                found.append(_Writer(square * (weight_noise(reader) * energy), behind.square))
    return found


def _best_rotation(readers: Sequence[_Readers], writers: Sequence[_Writer]) -> Tensor:
    """The orthogonal R `[n, n]`, float64, v' = R v, with the least loss of all sites that read its space."""
    n = readers[0].site.channels
    s = torch.stack([r.covariance for r in readers]).float()
    f = torch.stack([r.curvature for r in readers]).float()
    unit = float((s.diagonal(dim1=1, dim2=2).sum(1) * f.diagonal(dim1=1, dim2=2).sum(1)).sum()) / n
    energy = torch.stack([w.energy for w in writers]).float() if writers else None
    felt = torch.stack([w.curvature for w in writers]).float() if writers else None

    def diagonals(matrices: Tensor, r: Tensor) -> Tensor:
        return ((r @ matrices) * r).sum(-1)

    def loss(r: Tensor) -> Tensor:
        both = diagonals(s, r).clamp(min=0) * diagonals(f, r).clamp(min=0)
        total = (both + 1e-20 * unit).sqrt().sum(1).square().sum() / n
        if energy is not None and felt is not None:
            total = total + (diagonals(energy, r) * diagonals(felt, r)).sum()
        return total / max(unit, 1e-30)

    start = torch.linalg.eigh(f.double().sum(0)).eigenvectors.mT.contiguous()
    rotation = start.float().requires_grad_()
    optimizer = RiemannianAdam([{"params": [rotation], "lr": RATE * math.sqrt(n), "manifold": "stiefel"}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(rotation).backward()
        optimizer.step()
        schedule.step()
    left, _, right = torch.linalg.svd(rotation.detach().double())
    return left @ right


def _edge(
    r: _Readers, spaces: Spaces, rotations: dict[str, Tensor], fold: Fold, *, scaled: bool
) -> EdgeTransform:
    mean, covariance, curvature = r.mean, r.covariance, r.curvature
    atoms = {atom for atom, _ in leaves(r.dim)}
    for space in spaces.spaces:
        if space.name in rotations and space.atom in atoms:
            matrix = rotations[space.name]
            mean = rotated(mean, [r.dim], space, matrix)
            covariance = _in_basis(covariance, r.dim, space, matrix)
            curvature = _in_basis(curvature, r.dim, space, torch.linalg.inv(matrix).mT)
    shifted = fold.shift == "learned" and r.site.shift_refusal is None
    orders = factor(r.site.channels) if scaled else ()
    scale = None
    if scaled and fold.scale == "learned":
        s, f = (_floored(m.diagonal()) for m in (covariance, curvature))
        scale = (s / f) ** 0.25
        scale = scale / scale.log().mean().exp()
    return EdgeTransform(scale, mean if shifted else None, orders)


def _floored(diagonal: Tensor) -> Tensor:
    least = max(float(diagonal.mean()) * FLOOR, 1e-30)
    return diagonal.clamp(min=least)


def _in_basis(square: Tensor, dim: Dim, space: Space, matrix: Tensor) -> Tensor:
    """T M T^T for a matrix `[K, K]` over a dimension, a side at a time."""
    for _ in range(2):
        square = rotated(square, [new(len(square)), dim], space, matrix).mT
    return square
