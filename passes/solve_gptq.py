"""GPTQ: weights are rounded one input at a time, and those not rounded yet make up for the error so far.

    minimize over codes   tr (W - Q) H (W - Q)^T,    H = E[x x^T]

For input j in turn, with U the upper Cholesky factor of H^-1:

    q_j = round(w_j),   e = (w_j - q_j) / U_jj,   w_k <- w_k - e U_jk   for all k > j

Inputs with large H_jj come first, while there is freedom left. Scales and zero points are those of the range search on
the weight as it was (one for each row, or for each group of inputs in their own order), so the order leaves nothing
behind that would have to be stored. H is damped by a share of its mean diagonal; inputs that are always 0 take no part.

x is what the linear will read: the value after its activation quantizer, earlier weights still being float. Each expert
of a mixture has an H of its own, over the n rows that chose it and as many of all rows as there are inputs:
(n H_e + K H) / (n + K). An expert that few rows chose gets near the mean of all, one that none chose the mean itself.

Source: GPTQ (arXiv 2210.17323); the Cholesky form and the damping are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiler.dialect.packing import code_range
from ..compiler.program import Program
from .calibrate import stream
from .ranges import QuantizedMatrix, dequantized

DAMP = 0.01
"""Share of the mean of H's diagonal that is added to it."""

ENOUGH = 1 << 15
"""Rows of x after which no more calibration batches are run."""

BLOCK = 128
"""Inputs whose errors are gathered before the others take them up, in one product."""


class Read(NamedTuple):
    """What a linear multiplies, by node name: a value, and for `experts` the value that holds each row's choice."""

    value: str
    chooser: str | None = None
    experts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """All values that have to be seen."""
        return (self.value,) if self.chooser is None else (self.value, self.chooser)


def input_products(
    program: Program, inputs: Mapping[str, Sequence[Read]], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """H float32 `[K, K]`, of experts `[E, K, K]`, for each key of `inputs`, over all that is read there.

    batches as in `calibrate`, run until there are `ENOUGH` rows. Raises InputError as `calibrate.stream` does.
    """
    keys: dict[Read, list[str]] = {}
    for key, reads in inputs.items():
        for read in dict.fromkeys(reads):
            keys.setdefault(read, []).append(key)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    rows: dict[Read, int] = dict.fromkeys(keys, 0)
    reads_of: dict[str, list[Read]] = {}
    for read in keys:
        for name in read.names:
            reads_of.setdefault(name, []).append(read)
    held: dict[Read, dict[str, Tensor]] = {}

    def observe(name: str, x: Tensor, batch: int) -> None:
        for read in reads_of[name]:
            seen = held.setdefault(read, {})
            seen[name] = x
            if len(seen) < len(read.names):
                continue
            del held[read]
            flat = seen[read.value].reshape(-1, seen[read.value].shape[-1]).float()
            rows[read] += len(flat)
            product, count = _products(flat, seen.get(read.chooser or ""), read.experts)
            for key in keys[read]:
                sums[key] = sums[key] + product if key in sums else product
                counts[key] = counts[key] + count if key in counts else count

    def until_enough() -> Iterator[Any]:
        for batch in batches:
            yield batch
            if min(rows.values(), default=0) >= ENOUGH:
                return

    stream(program, reads_of, until_enough(), observe)
    return {key: _mean(product, counts[key]) for key, product in sums.items()}


def _products(rows: Tensor, ids: Tensor | None, experts: int) -> tuple[Tensor, Tensor]:
    """x^T x and the number of rows, of each expert where there are ids."""
    if ids is None:
        return rows.mT @ rows, torch.tensor([len(rows)])
    chosen = [rows[ids.flatten() == e] for e in range(experts)]
    return torch.stack([x.mT @ x for x in chosen]), torch.tensor([len(x) for x in chosen])


def _mean(total: Tensor, counts: Tensor) -> Tensor:
    if total.dim() == 2:
        return total / counts.clamp(min=1)
    own, prior = counts[:, None, None], total.shape[-1]
    return (total + prior * total.sum(0) / counts.sum().clamp(min=1)) / (own + prior)


@torch.no_grad()
def solve_gptq(
    weight: Tensor, like: QuantizedMatrix, product: Tensor, *, bits: int, group_size: int
) -> QuantizedMatrix:
    """Codes for `weight` `[N, K]` with the scales and zero points of `like`; product: H `[K, K]`."""
    low, high = code_range(bits, like.zero is None)
    w = weight.detach().double()
    n, k = w.shape
    size = group_size or k
    scale = like.scale.double().repeat_interleave(size, 1)[:, :k]
    zero = None if like.zero is None else like.zero.double().repeat_interleave(size, 1)[:, :k]
    order = torch.argsort(product.diagonal(), descending=True)
    upper = _inverse_factor(product.double()[order][:, order])
    left, codes = w[:, order].clone(), torch.empty(n, k, dtype=torch.float64)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = torch.zeros(n, end - start, dtype=torch.float64)
        for j in range(start, end):
            at = int(order[j])
            step = scale[:, at]
            offset = 0.0 if zero is None else zero[:, at]
            steps = torch.where(step == 0, 0.0, left[:, j] / torch.where(step == 0, 1.0, step))
            code = (steps + offset).round().clamp(low, high)
            codes[:, at] = torch.where(step == 0, 0.0, code)
            error = (left[:, j] - step * (code - offset)) / upper[j, j]
            left[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
            errors[:, j - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    found = QuantizedMatrix(codes.to(torch.int8).reshape(weight.shape), like.scale, like.zero, 0.0)
    difference = dequantized(found, group_size).double() - w
    relative = float((difference.square().sum() / w.square().sum().clamp(min=1e-30)).sqrt())
    return replace(found, error=relative)


def solve_gptq_of_all(
    weight: Tensor, like: QuantizedMatrix, product: Tensor, *, bits: int, group_size: int
) -> QuantizedMatrix:
    """`solve_gptq`, for experts one above the other where product is `[E, K, K]`."""
    if product.dim() == 2:
        return solve_gptq(weight, like, product, bits=bits, group_size=group_size)
    n, parts = len(weight) // len(product), []
    for e, own in enumerate(product):
        rows = slice(e * n, (e + 1) * n)
        zero = None if like.zero is None else like.zero[rows]
        part = QuantizedMatrix(like.codes[rows], like.scale[rows], zero, like.error)
        parts.append(solve_gptq(weight[rows], part, own, bits=bits, group_size=group_size))
    powers = weight.detach().double().square().unflatten(0, (len(product), -1)).sum((1, 2))
    lost = sum(part.error**2 * float(power) for part, power in zip(parts, powers, strict=True))
    error = (lost / max(float(powers.sum()), 1e-30)) ** 0.5
    return QuantizedMatrix(torch.cat([part.codes for part in parts]), like.scale, like.zero, error)


def _inverse_factor(h: Tensor) -> Tensor:
    """U upper triangular, U^T U = (H + damping)^-1. Inputs that are always 0 stand alone, with 1 on the diagonal."""
    diagonal = h.diagonal()
    silent = diagonal <= 0
    damping = torch.where(silent, 1.0, DAMP * float(diagonal.mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h + torch.diag(damping)))
    return torch.linalg.cholesky(inverse, upper=True)
