"""What choosers know of a site's activations, collected in one streaming run over the calibration data.

For each channel the least, largest, mean and mean of squares over every row; a bounded, seeded, uniform sample
of rows, on which the error of a choice is computed with the site's own operators; and, on request, the whole
covariance. A row is the vector of channels of one token or pixel. For convolutions, which read neighbours too, the
sample is of whole samples of the batch instead.

Nothing grows with the amount of data. The sample is drawn by random keys, a row staying while its key is among
the largest, so all rows have the same chance, in whatever batches they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import InputError
from ..compiler.program import Program
from .calibrate import stream
from .qsur import Moments
from .sites import Site

ROWS = 1024
"""Rows in the sample of a linear's site, fewer where they are wide."""

ELEMENTS = 1 << 20
"""Elements in the sample of a site (but at least `LEAST_ROWS` rows, or one whole sample of a convolution)."""

LEAST_ROWS = 256


@dataclass
class SiteStatistics:
    """Statistics of one site, all float64 `[K]`, over `count` rows.

    sample: float32 tensors that the readers can run on: one `[rows, K]` for linears, some of `[1, K, ...]` for
    convolutions. chosen: for linears of experts, the expert of each of these rows int64 `[rows]`, by the name of the
    value that holds them. covariance: `[K, K]`, or None where it was not asked for.
    """

    channels: int
    count: int = 0
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    mean_square: Tensor = field(init=False)
    sample: list[Tensor] = field(default_factory=list)
    chosen: dict[str, Tensor] = field(default_factory=dict)
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        self.low = torch.full((self.channels,), float("inf"), dtype=torch.float64)
        self.high = -self.low
        self.mean = torch.zeros(self.channels, dtype=torch.float64)
        self.mean_square = torch.zeros(self.channels, dtype=torch.float64)

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel."""
        return torch.maximum(self.high, -self.low)

    @property
    def moments(self) -> Moments | None:
        """Mean and covariance for QSUR, None where the covariance was not collected."""
        return None if self.covariance is None else Moments(self.mean, self.covariance)

    def add(self, rows: Tensor, second_moment: bool) -> None:
        """Count float `rows [R, K]`."""
        if not len(rows):
            return
        values = rows.double()
        before, self.count = self.count, self.count + len(values)
        share = len(values) / self.count
        self.low = torch.minimum(self.low, values.amin(0))
        self.high = torch.maximum(self.high, values.amax(0))
        if second_moment:
            self._add_covariance(values, before, share)
        self.mean = self.mean.lerp(values.mean(0), share)
        self.mean_square = self.mean_square.lerp(values.square().mean(0), share)

    def _add_covariance(self, values: Tensor, before: int, share: float) -> None:
        mean = values.mean(0)
        own = (values - mean).T @ (values - mean) / len(values)
        if self.covariance is None:
            self.covariance = own
            return
        apart = mean - self.mean
        between = before / self.count * share * torch.outer(apart, apart)
        self.covariance = self.covariance.lerp(own, share) + between


class _Reservoir:
    """The items with the largest of the keys drawn so far, up to a number or a size in elements."""

    def __init__(self, rows: bool) -> None:
        self.rows = rows
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.items: list[Tensor] = []

    def add(self, x: Tensor, keys: Tensor, width: int | None = None) -> None:
        """Offer `x [n, ...]` with one key for each of its n items; width: what a row counts, if not its elements."""
        if self.rows:
            held = torch.cat([*self.items, x]) if self.items else x
            keys = torch.cat([self.keys, keys])
            most = min(ROWS, max(LEAST_ROWS, ELEMENTS // max(width or x.shape[1], 1)))
            best = keys.topk(min(most, len(keys))).indices.sort().values
            self.keys, self.items = keys[best], [held[best].clone()]
            return
        items, keys = [*self.items, *(s.clone() for s in x.split(1))], torch.cat([self.keys, keys])
        kept: list[int] = []
        used = 0
        for index in keys.argsort(descending=True).tolist():
            used += items[index].numel()
            if kept and used > ELEMENTS:
                break
            kept.append(index)
        self.keys, self.items = keys[kept], [items[index] for index in kept]


def measure(
    program: Program,
    sites: Sequence[Site],
    batches: Iterable[Any] | None,
    *,
    covariance: bool = False,
    seed: int = 0,
    needed_by: str = "this method",
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, SiteStatistics]:
    """Statistics of every site by its name, from calibration batches as `calibrate.calibrate` takes them.

    Raises InputError where there are none (`needed_by` names what asks for them) or they do not fit.
    """
    if batches is None:
        raise InputError(
            f"{needed_by} needs calibration data",
            expected="calibration: an iterable of batches of inputs",
            hint="pass calibration=..., or choose a method that looks at weights only (scale: cle)",
        )
    by_value: dict[str, list[Site]] = {}
    choosers: dict[str, list[Site]] = {}
    for site in sites:
        by_value.setdefault(site.value, []).append(site)
        for name in {reader.chooser for reader in site.readers if reader.chooser is not None}:
            choosers.setdefault(name, []).append(site)
    found = {site.name: SiteStatistics(site.channels) for site in sites}
    reservoirs = {site.name: _Reservoir(rows=site.channel_dim == -1) for site in sites}
    chosen = {(site.name, name): _Reservoir(rows=True) for name, held in choosers.items() for site in held}

    def keys_of(count: int, batch: int) -> Tensor:
        # One generator a batch: sites that see the same tokens sample the same ones, and their experts with them.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + batch)
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def observe(value: str, x: Tensor, batch: int) -> None:
        for site in choosers.get(value, ()):
            # As wide as the site's rows, so that as many stay.
            held = chosen[site.name, value]
            held.add(x.detach().reshape(-1, 1), keys_of(x.numel(), batch), width=site.channels)
        for site in by_value.get(value, ()):
            rows = x.movedim(site.channel_dim, -1).reshape(-1, site.channels)
            found[site.name].add(rows, covariance)
            items = rows if site.channel_dim == -1 else x
            reservoirs[site.name].add(items.detach().float(), keys_of(len(items), batch))

    stream(program, {*by_value, *choosers}, batches, observe, progress)
    for name, statistics in found.items():
        statistics.sample = reservoirs[name].items
    for (name, chooser), reservoir in chosen.items():
        found[name].chosen[chooser] = torch.cat(reservoir.items).flatten()
    return found
