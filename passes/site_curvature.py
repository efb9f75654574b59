"""Second moments of what sites hold and of what the loss feels there: the quadratic model of rounding.

    loss(x + e) - loss(x)  ~  1/2 e^T F e,      F = E[g g^T],   g = d log p(y | inputs) / dx,   y ~ p

F is the Fisher information, which for the divergence between outputs is its curvature: labels y are drawn from the
program's own logits, so that no targets are needed. For outputs that are no logits (hidden states, waveforms) the loss
is the relative squared error, and g is the gradient of <u, y> / |y| with a random normal u, whose second moment is
half of that loss's curvature. One backward run a batch gives g at every site and at the output of every reader at once.

Source of the Kronecker form that is built on it (one factor from x, one from g): K-FAC (arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..compiler.program import Program
from .calibrate import batch_arguments
from .kl_top import vocabulary_outputs
from .sites import Reader, Site

BATCHES = 8
"""Batches that are looked at: moments of some ten thousand tokens are those of all."""


@dataclass
class Moments:
    """Mean `[K]` and second moment `[K, K]` of rows, float64."""

    mean: Tensor
    square: Tensor
    rows: int = 0

    @staticmethod
    def of(channels: int) -> Moments:
        """Of nothing yet."""
        return Moments(
            torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, channels, dtype=torch.float64)
        )

    def add(self, rows: Tensor) -> None:
        """Count rows `[R, K]`."""
        self.rows += len(rows)
        share = len(rows) / max(self.rows, 1)
        self.mean.lerp_(rows.mean(0).double(), share)
        self.square.lerp_((rows.mT @ rows / len(rows)).double(), share)

    def covariance(self) -> Tensor:
        """Second moment around the mean."""
        return self.square - torch.outer(self.mean, self.mean)


@dataclass
class SiteCurvature:
    """What is known of a site: moments of its rows, of the gradients there, and of those behind each reader.

    felt: mean squares of the latter over all rows, for each row of the reader's weight: of experts, each row of the
    value counts for the one that it chose.
    """

    value: Moments
    gradient: Moments
    outputs: dict[str, Moments] = field(default_factory=dict)
    """By the reader's node."""
    felt: dict[str, Tensor] = field(default_factory=dict)


def measure_curvature(
    program: Program, sites: Sequence[Site], batches: Iterable[Any], seed: int = 0
) -> dict[str, SiteCurvature]:
    """Curvature at every site of linears, by its name; batches as in `calibrate`, the first `BATCHES` of them."""
    generator = torch.Generator().manual_seed(seed)
    linears = [site for site in sites if site.kind == "weights"]
    found = {
        site.name: SiteCurvature(
            Moments.of(site.channels),
            Moments.of(site.channels),
            {reader.node: Moments.of(len(reader.weight) // (reader.experts or 1)) for reader in site.readers},
            {reader.node: torch.zeros(len(reader.weight), dtype=torch.float64) for reader in site.readers},
        )
        for site in linears
    }
    readers = [reader for site in linears for reader in site.readers]
    watched = {site.value for site in linears} | {r.node for r in readers}
    watched |= {r.chooser for r in readers if r.chooser is not None}
    logits = vocabulary_outputs(program)
    for index, batch in zip(range(BATCHES), batches, strict=False):
        args, kwargs = batch_arguments(program, batch, index)
        with torch.enable_grad():
            run = _Watching(program, watched)
            outputs = pytree.tree_leaves(
                run.run(*program.flatten_inputs(args, kwargs), enable_io_processing=False)
            )
            felt = _felt(outputs, logits, generator)
            names = [name for name, held in run.held.items() if held.is_floating_point()]
            gradients = torch.autograd.grad(felt, [run.held[name] for name in names], allow_unused=True)
        slopes = dict(zip(names, gradients, strict=True))
        for site in linears:
            held, slope = run.held.get(site.value), slopes.get(site.value)
            if held is None or slope is None:
                continue
            found[site.name].value.add(held.detach().reshape(-1, site.channels))
            found[site.name].gradient.add(slope.reshape(-1, site.channels))
            for reader in site.readers:
                behind = slopes.get(reader.node)
                if behind is not None:
                    rows = behind.reshape(-1, behind.shape[-1])
                    ids = None if reader.chooser is None else run.held[reader.chooser]
                    _add(found[site.name], reader, rows, ids)
    return found


def _add(found: SiteCurvature, reader: Reader, rows: Tensor, ids: Tensor | None) -> None:
    moments, felt = found.outputs[reader.node], found.felt[reader.node]
    moments.add(rows)
    if ids is None:
        felt.copy_(moments.square.diagonal())
        return
    known = (ids >= 0) & (ids < reader.experts)
    sums = torch.zeros(reader.experts, rows.shape[-1], dtype=torch.float64)
    sums.index_add_(0, ids[known], rows[known].double().square())
    felt.lerp_(sums.flatten() / len(rows), len(rows) / moments.rows)


def _felt(outputs: Sequence[Any], logits: Sequence[bool], generator: torch.Generator) -> Tensor:
    """A scalar whose gradient at a value is g of every row there."""
    parts = []
    for is_logits, y in zip(logits, outputs, strict=True):
        if not isinstance(y, Tensor) or not y.requires_grad:
            continue
        if is_logits:
            flat = y.flatten(0, -2)
            drawn = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
            parts.append(F.cross_entropy(flat, drawn, reduction="sum"))
        else:
            u = torch.randn(y.shape, generator=generator, dtype=y.dtype)
            parts.append((u * y).sum() / y.detach().square().mean().sqrt().clamp(min=1e-12))
    return torch.stack(parts).sum()


class _Watching(fx.Interpreter):
    """Keeps the values of some nodes, and lets gradients flow from the first of them on."""

    def __init__(self, program: Program, watched: set[str]) -> None:
        super().__init__(program.graph_module)
        self.watched = watched
        self.held: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.watched and isinstance(result, Tensor):
            if result.is_floating_point() and not result.requires_grad:
                result = result.detach().requires_grad_()
            self.held[n.name] = result
        return result
