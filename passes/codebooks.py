"""Fitting additive codebooks to a matrix: residual k-means, then coordinate descent.

    W[n, 8 g + j] ~ scale[n] sum_m C_m[c[n, g, m], j]

1. scale[n] is the root mean square of row n, so that vectors of all rows are alike.
2. Residual k-means: C_0 is fitted to the vectors, C_1 to what is left of them, and so on (AQLM's initialization).
3. Rounds of coordinate descent: for each m, vectors are assigned anew to what the other codebooks leave, and C_m
   moves to the means. Each step lowers the squared error of the weights (means are weighted with scale^2, as a
   vector's error counts that often).
4. Each scale becomes the least-squares one, <W, D> / <D, D> for the decoded row D.

Codebooks are rounded to float16, as stored, before codes are chosen. It sees weights only: published checkpoints
that were fitted to activations and fine-tuned are better, and are read by `import_codebooks`. Deterministic: samples
come from a seed. Time is dominated by distances, 16 N K / 8 2^b operations for every assignment: seconds for a matrix
of 4096 x 4096 with 8-bit codes, many minutes with 16-bit ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiler.dialect.packing_codebook import GROUP, CodebookMatrix

_CHUNK = 1 << 22
"""Distances that are held at a time."""
_STEPS, _ROUNDS = {8: 12, 16: 3}, {8: 3, 16: 1}
"""Steps of k-means on a sample, and rounds of coordinate descent, by the width of codes."""
_SAMPLES_PER_CENTRE = 256


def fit_codebooks(weight: Tensor, codebooks: int, code_bits: int, seed: int = 0) -> CodebookMatrix:
    """Additive codes of `weight` float `[N, K]` with `codebooks` codebooks of 2^code_bits vectors."""
    matrix = F.pad(weight.detach().to(torch.float32), (0, -weight.shape[1] % GROUP))
    n, k = weight.shape
    generator = torch.Generator().manual_seed(seed)
    largest = matrix.abs().amax(1).clamp(min=1e-30)
    scale = largest * (weight.float() / largest[:, None]).square().mean(1).sqrt()
    divisor = torch.where(scale > 0, scale, 1.0)
    vectors = (matrix / divisor[:, None]).reshape(-1, GROUP)
    share = (scale / scale.max().clamp(min=1e-30)).square().repeat_interleave(matrix.shape[1] // GROUP)
    codes = torch.zeros(codebooks, len(vectors), dtype=torch.int64)
    books = torch.zeros(codebooks, 2**code_bits, GROUP)
    residual = vectors.clone()
    for m in range(codebooks):
        books[m] = _k_means(residual, share, 2**code_bits, _STEPS[code_bits], generator)
        codes[m] = _nearest(residual, books[m])
        residual -= books[m][codes[m]]
    for _ in range(_ROUNDS[code_bits]):
        for m in range(codebooks):
            residual += books[m][codes[m]]
            books[m] = _means(residual, share, codes[m], books[m])
            codes[m] = _nearest(residual, books[m])
            residual -= books[m][codes[m]]
    decoded = (vectors - residual).reshape(n, -1)[:, :k].double()
    power = decoded.square().sum(1)
    scale = torch.where(power > 0, (decoded * weight.double()).sum(1) / power.clamp(min=1e-300), 0.0)
    dtype = torch.uint8 if code_bits == 8 else torch.uint16
    stored = codes.T.reshape(n, -1, codebooks).to(torch.int32).to(dtype)
    return CodebookMatrix(stored, books, scale.to(torch.float32), k)


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each vector, int64."""
    half = centres.square().sum(1) / 2
    step = max(1, _CHUNK // len(centres))
    return torch.cat([(half - part @ centres.T).argmin(1) for part in vectors.split(step)])


def _means(vectors: Tensor, share: Tensor, index: Tensor, before: Tensor) -> Tensor:
    """Weighted means of the vectors of each centre, rounded to float16; a centre without vectors stays."""
    size = len(before)
    mass = torch.zeros(size, dtype=torch.float64).index_add_(0, index, share.double())
    sums = torch.zeros(size, GROUP, dtype=torch.float64)
    sums.index_add_(0, index, vectors.double() * share[:, None].double())
    means = torch.where(mass[:, None] > 0, sums / mass.clamp(min=1e-300)[:, None], before.double())
    return means.to(torch.float16).to(torch.float32)


def _k_means(vectors: Tensor, share: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Centres `[size, 8]` fitted to a sample of the vectors, starting from some of them."""
    order = torch.randperm(len(vectors), generator=generator)[: size * _SAMPLES_PER_CENTRE]
    sample, share = vectors[order], share[order]
    start = sample[:size]
    centres = torch.zeros(size, GROUP)
    centres[: len(start)] = start
    centres = centres.to(torch.float16).to(torch.float32)
    if len(sample) <= size:
        return centres
    for _ in range(steps):
        index = _nearest(sample, centres)
        centres = _means(sample, share, index, centres)
        lost = torch.nonzero(torch.bincount(index, minlength=size) == 0).flatten()
        if len(lost):
            # A centre that nothing is nearest to starts again where the error is largest.
            distance = (sample - centres[index]).square().sum(1) * share
            worst = distance.topk(min(len(lost), len(sample))).indices
            centres[lost[: len(worst)]] = sample[worst].to(torch.float16).to(torch.float32)
    return centres
