"""The error that a transform leaves at a site: what choosers minimize.

    sum over readers of mean over tokens of |Q(x') Q(W')^T + W z - x W^T|^2 / |x W^T|^2,
    x' = ((x - z) / s) H,   W' = W diag(s) H

on the site's sample, with both Q as the recipe has them: the activation format (dynamic, or a static range found as
in `quantize_activations`; its bits, or FP8) and each reader's weight format (bits, groups, range search).

Each token counts relative to its own output (each sample, for convolutions). Behind a GELU or in a residual stream
a few tokens are a hundred times larger than the rest (Sun et al., arXiv 2402.17762), and a plain sum of squares
would serve only them: on MiniLM it preferred scales that were ten times worse for all other tokens.

A static range is found on one half of the tokens and the error taken on the other, both ways round, so that a
transform whose range depends on a few rare tokens does not look better than it is. For wide layers the outputs
are a seeded sample of rows of W, as rows are rounded independently of each other. Experts are read by the rows that
chose them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.dialect import quantize_dequantize, quantize_dequantize_fp8
from ..compiler.dialect.quantize_dequantize import granularity_dims
from .calibrate import Histogram, static_params, static_scale
from .site_statistics import SiteStatistics
from .sites import EdgeTransform, Reader, Site, added

OUTPUTS = 512
"""Outputs of a reader that are looked at."""

IDENTITY = EdgeTransform()

Error = Callable[[EdgeTransform], float]
"""What a chooser minimizes: a `SiteError`, or one with something behind it."""


@dataclass(frozen=True)
class _Target:
    """A reader, the rows of its weight that are looked at, what expert each token chose, its outputs `[tokens, ...]`
    and 1 / their power."""

    reader: Reader
    weight: Tensor
    chosen: list[Tensor | None]
    outputs: list[Tensor]
    shares: list[Tensor]


class SiteError:
    """The relative error of one site as a function of its transform. Calls are deterministic."""

    def __init__(self, site: Site, statistics: SiteStatistics, seed: int = 0) -> None:
        self.site, self.statistics = site, statistics
        self._static = site.activations.mode == "static"
        self._parts = _split(statistics.sample, self._static)
        generator = torch.Generator().manual_seed(seed)
        self._targets = [self._target(reader, generator) for reader in site.readers]

    def _target(self, reader: Reader, generator: torch.Generator) -> _Target:
        weight = reader.some(OUTPUTS, generator)
        chosen: list[Tensor | None] = [None] * len(self._parts)
        if reader.chooser is not None:
            chosen = list(_split([self.statistics.chosen[reader.chooser]], self._static))
        with torch.no_grad():
            outputs = [reader.run(x, weight, ids) for x, ids in zip(self._parts, chosen, strict=True)]
        powers = [y.flatten(1).square().sum(1, dtype=torch.float64) for y in outputs]
        shares = [torch.where(p > 0, 1 / p, torch.zeros_like(p)) for p in powers]
        return _Target(reader, weight, chosen, outputs, shares)

    def __call__(self, transform: EdgeTransform = IDENTITY) -> float:
        """The error with this transform, summed over the readers."""
        return sum(self.per_reader(transform))

    def per_reader(self, transform: EdgeTransform = IDENTITY) -> list[float]:
        """The error of each reader with this transform."""
        found = []
        for target, residuals in zip(self._targets, self.residuals(transform), strict=True):
            parts = [
                e.flatten(1).square().sum(1, dtype=torch.float64) * share
                for e, share in zip(residuals, target.shares, strict=True)
            ]
            found.append(float(torch.cat(parts).mean()) if parts else 0.0)
        return found

    @torch.no_grad()
    def residuals(self, transform: EdgeTransform = IDENTITY) -> list[list[Tensor]]:
        """For each reader what rounding adds to its outputs, in the parts of the sample."""
        moved = [transform.apply(x, self.site.channel_dim) for x in self._parts]
        rounded = self._round_activations(moved, transform)
        found = []
        for target in self._targets:
            weight = target.reader.rounded(transform.fold(target.weight).float())
            offset = transform.offset(target.weight)
            errors = []
            for x, ids, y in zip(rounded, target.chosen, target.outputs, strict=True):
                e = target.reader.run(x, weight, ids) - y
                if offset is not None:
                    e = e + added(offset.to(e), e, ids, target.reader.experts, self.site.channel_dim)
                errors.append(e)
            found.append(errors)
        return found

    def _round_activations(self, moved: list[Tensor], transform: EdgeTransform) -> list[Tensor]:
        """Transformed sample values as the recipe's quantizer leaves them."""
        site, form = self.site, self.site.activations
        if form.mode == "float":
            return moved
        params: tuple[Tensor | None, Tensor | None] = (None, None)
        if form.mode == "static":
            # Each half is rounded in the range of the other one.
            params = (
                self._static_params(moved[1::2] or moved, transform),
                self._static_params(moved[::2], transform),
            )
        if form.format == "e4m3":
            return [quantize_dequantize_fp8.overload(x, params[i % 2]) for i, x in enumerate(moved)]
        round_ = quantize_dequantize.overload
        return [round_(x, params[i % 2], site.granularity, site.bits) for i, x in enumerate(moved)]

    def _static_params(self, moved: list[Tensor], transform: EdgeTransform) -> Tensor:
        """Scale and zero point (of FP8: the scale) that `quantize_activations` would find here, with the exact
        extremes of all data."""
        form, histogram = self.site.activations, Histogram()
        for x in moved:
            histogram.add(x, granularity_dims(x, "sample" if self.site.kind == "convolutions" else "token"))
        if not transform.hadamard:
            ends = transform.apply(torch.stack([self.statistics.low, self.statistics.high]))
            histogram.low, histogram.high = float(ends.min()), float(ends.max())
        if form.format == "e4m3":
            return static_scale(histogram.largest(form.percentile, form.range))
        bits = self.site.bits
        return static_params(*histogram.range(form.percentile, form.range, bits), bits)


def best_exponent(make: Callable[[float], EdgeTransform], error: Error) -> EdgeTransform:
    """The best of `make(alpha)` over alpha = 0, 0.1, ..., 1, refined to steps of 0.05 around it; or none at all.

    The grid of SmoothQuant's and AWQ's searches in two steps: the error is smooth in alpha.
    """
    found = {step: make(step / 20) for step in range(0, 21, 2)}
    errors = {step: error(transform) for step, transform in found.items()}
    middle = min(errors, key=lambda step: errors[step])
    for step in (middle - 1, middle + 1):
        if 0 <= step <= 20:
            found[step] = make(step / 20)
            errors[step] = error(found[step])
    best = min(errors, key=lambda step: errors[step])
    return found[best] if errors[best] < error(IDENTITY) else IDENTITY


def _split(sample: list[Tensor], static: bool) -> list[Tensor]:
    """The sample in parts that take turns as halves: for static ranges a linear's rows are split in two."""
    if static and len(sample) == 1 and len(sample[0]) > 1:
        return [sample[0][::2], sample[0][1::2]]
    return sample
