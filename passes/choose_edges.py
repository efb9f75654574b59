"""One scale and shift for every site of a program, by the method that a recipe names, with what it gains.

`smoothquant`, `osplus`, `awq` and `cle` are the methods of their modules. `search` takes at every site whichever of
them leaves the least error (`site_error`), or none: sites differ in what hurts them (massive activations behind a
GELU, a wide residual stream, small weights), and a method that wins on the mean loses at some.

Shifts: `osplus` moves channels to the middle of their range, `mean` by their mean, which also takes the mean's share of
the weights' rounding error out of the outputs; `search` tries both, but the middle only for dynamic ranges: it hangs
on the two most extreme tokens of the calibration data, and in a static range new tokens then fall outside (MiniLM,
W8A8: cosine 0.9980 with it, 0.9986 without). A shift stays only where it lowers the error of the scaled site:
behind a GELU the middle of the range is far from where values lie.

Nothing is applied here. The result is for `fold_scale` and its like, where the graph absorbs it, and for
`transform_edges`, which applies the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ..compiler.hadamard_orders import factor
from ..compiler.program import Program
from ..compiler.recipe import Recipe
from .choose_awq import choose_awq
from .choose_equalization import choose_equalization
from .choose_osplus import choose_osplus, osplus_shift
from .choose_smoothquant import choose_smoothquant
from .qsur import qsur_root
from .site_error import SiteError
from .site_statistics import SiteStatistics, measure
from .sites import EdgeTransform, Site, find_sites

Scale = Literal["none", "smoothquant", "osplus", "awq", "cle", "search"]
Shift = Literal["none", "osplus", "mean", "search"]
Progress = Callable[[int, int], None]
"""Called with (sites done, sites in all)."""


@dataclass(frozen=True)
class EdgeChoice:
    """What was chosen at a site: the relative error (`SiteError`, per reader) before and after, and QSUR^(1/d).

    Both are None where the method saw no data, QSUR where no covariance was asked for.
    """

    site: Site
    transform: EdgeTransform
    error_before: float | None = None
    error_after: float | None = None
    qsur_before: float | None = None
    qsur_after: float | None = None


def choose_edges(
    program: Program,
    recipe: Recipe,
    *,
    scale: Scale = "search",
    shift: Shift = "none",
    calibration: Iterable[Any] | None = None,
    alpha: float | None = None,
    hadamard: Collection[str] = (),
    writers: Mapping[str, Tensor] | None = None,
    qsur: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, EdgeChoice]:
    """A choice for every site of `recipe` in the canonical `program`, by the site's name.

    alpha: SmoothQuant's, None to search it. hadamard: names of sites behind whose scale a Hadamard transform follows,
    which the choice then takes into account. writers: for `cle`, weights `[K, ...]` of the linears that write sites'
    values. Raises InputError where calibration data is missing for a method that needs it, or does not fit.
    """
    sites = find_sites(program, recipe)
    if scale in ("none", "cle") and shift == "none" and calibration is None:
        made = {s.name: _by_weights(s, scale, writers) for s in sites}
        return {s.name: EdgeChoice(s, _with_hadamard(s, made[s.name], hadamard)) for s in sites}
    needed_by = f"scale: {scale}" if scale not in ("none", "cle") else f"shift: {shift}"
    measured = measure(program, sites, calibration, covariance=qsur, seed=seed, needed_by=needed_by)
    found = {}
    for done, site in enumerate(sites):
        statistics = measured.pop(site.name)
        if not statistics.count:
            found[site.name] = EdgeChoice(site, EdgeTransform())
        else:
            error = _Behind(SiteError(site, statistics, seed), site.name in hadamard)
            transform = _choose(site, statistics, error, scale, shift, alpha, writers)
            found[site.name] = _described(site, statistics, error, error.placed(transform))
        if progress is not None:
            progress(done + 1, len(sites))
    return found


class _Behind:
    """A site's error with a Hadamard transform put behind every candidate, where the site has one."""

    def __init__(self, error: SiteError, transformed: bool) -> None:
        self.error = error
        self.orders = factor(error.site.channels) if transformed and error.site.channel_dim == -1 else ()

    def placed(self, transform: EdgeTransform) -> EdgeTransform:
        return replace(transform, hadamard=self.orders)

    def __call__(self, transform: EdgeTransform) -> float:
        return self.error(self.placed(transform))


def _choose(
    site: Site,
    statistics: SiteStatistics,
    error: Callable[[EdgeTransform], float],
    scale: Scale,
    shift: Shift,
    alpha: float | None,
    writers: Mapping[str, Tensor] | None,
) -> EdgeTransform:
    def smoothquant() -> EdgeTransform:
        return choose_smoothquant(site, statistics, error, alpha)

    def awq() -> EdgeTransform:
        return choose_awq(site, statistics, error)

    def osplus() -> EdgeTransform:
        return choose_osplus(site, statistics, error, shift=shift == "osplus")

    methods: dict[str, list[Callable[[], EdgeTransform]]] = {
        "none": [],
        "smoothquant": [smoothquant],
        "awq": [awq],
        "osplus": [osplus],
        "cle": [lambda: _by_weights(site, "cle", writers)],
        "search": [EdgeTransform, smoothquant, awq, osplus],
    }
    candidates = [method() for method in methods[scale]] or [EdgeTransform()]
    best = candidates[0] if len(candidates) == 1 else min(candidates, key=error)
    if shift == "none" or site.shift_refusal or best.shift is not None:
        return best
    middle = shift == "osplus" or (shift == "search" and site.activations.mode != "static")
    shifts = [osplus_shift(site, statistics)] if middle else []
    shifts += [] if shift == "osplus" else [statistics.mean]
    return min([best, *(EdgeTransform(best.scale, z) for z in shifts)], key=error)


def _by_weights(site: Site, scale: Scale, writers: Mapping[str, Tensor] | None) -> EdgeTransform:
    return EdgeTransform() if scale == "none" else choose_equalization(site, (writers or {}).get(site.name))


def _with_hadamard(site: Site, transform: EdgeTransform, hadamard: Collection[str]) -> EdgeTransform:
    placed = site.name in hadamard and site.channel_dim == -1
    return replace(transform, hadamard=factor(site.channels)) if placed else transform


def _described(
    site: Site, statistics: SiteStatistics, error: Callable[[EdgeTransform], float], transform: EdgeTransform
) -> EdgeChoice:
    readers = len(site.readers)
    before, after = error(EdgeTransform()) / readers, error(transform) / readers
    moments = statistics.moments
    if moments is None:
        return EdgeChoice(site, transform, before, after)
    moved = moments.scaled(transform.scale, transform.shift).hadamard(transform.hadamard)
    return EdgeChoice(site, transform, before, after, qsur_root(moments), qsur_root(moved))
