"""GPTQ: weights are rounded one input at a time, and those not rounded yet make up for the error so far.

    minimize over codes   tr (W - Q) H (W - Q)^T,    H = E[x x^T]

For input j in turn, with U the upper Cholesky factor of H^-1:

    q_j = round(w_j),   e = (w_j - q_j) / U_jj,   w_k <- w_k - e U_jk   for all k > j

Inputs with large H_jj come first, while there is freedom left. Scales and zero points are those of the range search on
the weight as it was (one for each row, or for each group of inputs in their own order), so the order leaves nothing
behind that would have to be stored. H is damped by a share of its mean diagonal; inputs that are always 0 take no part.

x is what the linear will read: the value after its activation quantizer, earlier weights still being float.

Source: GPTQ (arXiv 2210.17323); the Cholesky form and the damping are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

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


def input_products(
    program: Program, inputs: Mapping[str, Sequence[str]], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """H float32 `[K, K]` for each key of `inputs`, over the values (by node name) that are listed there.

    batches as in `calibrate`, run until there are `ENOUGH` rows. Raises InputError as `calibrate.stream` does.
    """
    keys: dict[str, list[str]] = {}
    for key, values in inputs.items():
        for value in dict.fromkeys(values):
            keys.setdefault(value, []).append(key)
    products: dict[str, Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(keys, 0)

    def observe(name: str, x: Tensor, batch: int) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        rows[name] += len(flat)
        product = flat.mT @ flat
        for key in keys[name]:
            products[key] = products[key] + product if key in products else product

    def until_enough() -> Iterator[Any]:
        for batch in batches:
            yield batch
            if min(rows.values(), default=0) >= ENOUGH:
                return

    stream(program, keys, until_enough(), observe)
    counts = {key: sum(rows[value] for value in dict.fromkeys(values)) for key, values in inputs.items()}
    return {key: product / max(counts[key], 1) for key, product in products.items()}


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


def _inverse_factor(h: Tensor) -> Tensor:
    """U upper triangular, U^T U = (H + damping)^-1. Inputs that are always 0 stand alone, with 1 on the diagonal."""
    diagonal = h.diagonal()
    silent = diagonal <= 0
    damping = torch.where(silent, 1.0, DAMP * float(diagonal.mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h + torch.diag(damping)))
    return torch.linalg.cholesky(inverse, upper=True)
