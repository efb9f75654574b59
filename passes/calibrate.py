"""Calibration: ranges of activations, measured by running the program on batches of data, once, as a stream.

Each observed value gets a histogram whose bins are multiples of a power of two. When a larger value arrives
the bins double in width and merge in pairs, so counts stay exact, whatever the order of the batches, and
nothing but the counts is kept. Ranges are then read off: least and largest, percentiles, or the range with
the least squared error, in which each token (each sample for convolutions) counts relative to its own
power: norms bring all tokens to one size, so that otherwise the few with massive activations (Sun et al.,
arXiv 2402.17762) would decide the range for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect.quantization import LEAST_SCALE, levels
from ..compiler.dialect.quantization_fp8 import LARGEST, decode, encode
from ..compiler.dialect.quantize_dequantize import granularity_dims
from ..compiler.errors import InputError
from ..compiler.program import Program

BINS = 4096
"""Bins on each side of zero."""

_SHRINK = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.81, 0.78, 0.74, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3)


class Histogram:
    """Counts of values in bins `[i, i + 1) * width`, i in -BINS..BINS-1, and the exact least and largest value."""

    def __init__(self) -> None:
        self.width = 0.0
        self.counts = torch.zeros(2 * BINS, dtype=torch.float64)
        self.relative = torch.zeros(2 * BINS, dtype=torch.float64)
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Tensor, dims: tuple[int, ...] = (-1,)) -> None:
        """Count finite float values of any shape; `dims` are those of one token (or sample)."""
        if values.numel() == 0:
            return
        flat = values.detach().flatten().to(torch.float32)
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        largest = max(-self.low, self.high)
        if largest == 0:
            self.width = self.width or 2.0**-100
        needed = math.ldexp(1.0, math.frexp(largest)[1] + 1 - BINS.bit_length()) if largest else self.width
        # One more doubling where the largest value sits on the end of the last bin.
        while not self._fits(needed):
            needed *= 2
        if self.width == 0:
            self.width = needed
        while self.width < needed:
            self._double()
        index = torch.floor(flat / self.width).to(torch.int64).add_(BINS).clamp_(0, 2 * BINS - 1)
        self.counts += torch.bincount(index, minlength=2 * BINS)
        power = (
            values.detach().square().mean(dims, keepdim=True, dtype=torch.float64).expand_as(values).flatten()
        )
        share = torch.where(power > 0, 1 / power, torch.zeros_like(power))
        self.relative += torch.bincount(index, share, minlength=2 * BINS)

    def _fits(self, width: float) -> bool:
        return self.low >= -BINS * width and self.high < BINS * width

    def _double(self) -> None:
        for bins in (self.counts, self.relative):
            pairs = bins.reshape(-1, 2).sum(1)
            bins.zero_()
            bins[BINS // 2 : BINS // 2 + BINS] = pairs
        self.width *= 2

    def range(self, percentile: float = 100.0, search: str = "minmax", bits: int = 8) -> tuple[float, float]:
        """A range that contains 0: by percentile (the share of values inside), or `mse` (for codes of that width)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if percentile < 100:
            share = self.counts.cumsum(0) / self.counts.sum()
            tail = (1 - percentile / 100) / 2
            first = int(torch.searchsorted(share, torch.tensor(tail, dtype=torch.float64), right=True))
            last = int(torch.searchsorted(share, torch.tensor(1 - tail, dtype=torch.float64)))
            low = min(max(low, (first - BINS) * self.width), 0.0)
            high = max(min(high, (last + 1 - BINS) * self.width), 0.0)
        return self._least_error(low, high, levels(bits)) if search == "mse" else (low, high)

    def largest(self, percentile: float = 100.0, search: str = "minmax") -> float:
        """The magnitude that the largest FP8 code stands for: of the range, or shrunken to the least squared error."""
        whole = max(abs(end) for end in self.range(percentile))
        if search != "mse" or whole == 0:
            return whole
        used = self.counts > 0
        centre = (torch.arange(-BINS, BINS, dtype=torch.float64)[used] + 0.5) * self.width
        errors = []
        for shrink in _SHRINK:
            scale = torch.tensor(whole * shrink / LARGEST, dtype=torch.float64)
            rounded = scale * decode(encode(centre, scale), torch.float64)
            errors.append(float((rounded - centre).square() @ self.relative[used]))
        return whole * _SHRINK[errors.index(min(errors))]

    def _least_error(self, low: float, high: float, largest: float) -> tuple[float, float]:
        """The shrunken ends whose codes have the least squared error, relative to each token's power.

        The rounding is carried out, not modelled: where most values lie within a few steps of zero (behind a
        GELU), it matters how they fall between the codes.
        """
        used = self.counts > 0
        centre = (torch.arange(-BINS, BINS, dtype=torch.float64)[used] + 0.5) * self.width
        weight = self.relative[used]
        best, least = (low, high), math.inf
        factors = torch.tensor(_SHRINK, dtype=torch.float64)
        for shrink in _SHRINK:
            scale = (high * factors - low * shrink) / largest
            scale = torch.where(scale >= LEAST_SCALE, scale, torch.ones_like(scale))[:, None]
            zero = torch.round(-low * shrink / scale).clamp(0, largest)
            rounded = scale * ((torch.round(centre / scale) + zero).clamp(0, largest) - zero)
            error = (rounded - centre).square() @ weight
            at = int(error.argmin())
            if float(error[at]) < least:
                least, best = float(error[at]), (low * shrink, high * _SHRINK[at])
        return best


def static_params(low: float, high: float, bits: int = 8) -> Tensor:
    """Scale and zero point, float32 `[2]`, for codes of that width over a range that contains 0 (docs/dialect.md)."""
    largest = levels(bits)
    scale = torch.tensor((high - low) / largest, dtype=torch.float32)
    scale = torch.where(scale >= LEAST_SCALE, scale, torch.ones_like(scale))
    zero = torch.round(torch.tensor(-low, dtype=torch.float32) / scale).clamp(0, largest)
    return torch.stack([scale, zero])


def static_scale(largest: float) -> Tensor:
    """Scale float32 `[1]` at which the largest FP8 code stands for this magnitude."""
    return torch.tensor([largest / LARGEST if largest > 0 else 1.0], dtype=torch.float32)


def calibrate(
    program: Program,
    nodes: Mapping[str, str],
    batches: Iterable[Any],
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Histogram]:
    """Histograms of the values of some nodes over all batches.

    nodes: names, and the granularity (`token | sample`) in which each will be read.
    batches: an iterable, read once. A batch is a tuple or list of arguments, a mapping of keyword arguments (or of
    parameter names), or a single tensor. progress is called with (batches done, batches in all or None).
    Raises InputError that names the batch and the input: NaN or infinity, a wrong structure, shape or dtype, a
    batch that the model cannot run, values that leave the float range, or no batches at all.
    """
    histograms = {name: Histogram() for name in nodes}

    def observe(name: str, found: Tensor, batch: int) -> None:
        histograms[name].add(found, granularity_dims(found, nodes[name]))

    stream(program, nodes, batches, observe, progress)
    return histograms


def stream(
    program: Program,
    names: Collection[str],
    batches: Iterable[Any],
    observe: Callable[[str, Tensor, int], None],
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Run the program on every batch and call `observe(name, value, batch)` for the nodes in `names`.

    Batches, progress and errors as in `calibrate`; values are finite.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            "Calibration data must be several batches",
            expected="an iterable of tuples of arguments, of dictionaries, or of single tensors",
            got=type(batches).__name__,
            hint="wrap a single batch in a list",
        )
    total = len(batches) if isinstance(batches, Sequence) else None
    done = 0
    for index, batch in enumerate(batches):
        args, kwargs = batch_arguments(program, batch, index)

        def check(node: fx.Node, found: Any, index: int = index) -> None:
            if node.name not in names:
                return
            if not torch.isfinite(found).all():
                raise InputError(
                    "The model computes NaN or infinity on calibration data",
                    where=f"batch {index}, value {node.name!r}",
                )
            observe(node.name, found, index)

        try:
            program.run_observed(check, args, kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise InputError(
                "The model cannot run on the calibration data",
                where=f"batch {index}",
                got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                hint="check ids against the vocabulary, and sizes against those the model was captured with",
            ) from error
        done = index + 1
        if progress is not None:
            progress(done, total)
    if not done:
        raise InputError(
            "There are no calibration batches",
            expected="at least one",
            hint="a generator can be read only once",
        )


def batch_arguments(program: Program, batch: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch as checked args and kwargs of the program."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {str(name): v for name, v in batch.items()}
        names = _parameter_names(program)
        if not program.example_kwargs and set(names) == set(kwargs):
            args, kwargs = tuple(kwargs[name] for name in names), {}
    else:
        args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    try:
        program.check_inputs(args, kwargs)
    except InputError as error:
        raise InputError(
            "Calibration data does not fit the model",
            where=f"batch {index}",
            expected=error.expected,
            got=f"{error.what}: {error.got}",
            hint=error.hint,
        ) from error
    for node, given in zip(program.placeholders, program.flatten_inputs(args, kwargs), strict=True):
        if isinstance(given, Tensor) and given.is_floating_point() and not torch.isfinite(given).all():
            count = int((~torch.isfinite(given)).sum())
            raise InputError(
                "Calibration data holds NaN or infinity",
                where=f"batch {index}, input {node.name!r}",
                got=f"{count} of {given.numel()} values",
                hint="remove the samples, or replace the values, before calibrating",
            )
    return args, kwargs


def _parameter_names(program: Program) -> list[str]:
    codegen = program.graph._codegen
    return list(codegen.pytree_info.orig_args) if isinstance(codegen, fx.graph._PyTreeCodeGen) else []
