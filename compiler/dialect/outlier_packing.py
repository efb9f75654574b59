"""The few large weights beside a matrix of low bits: the one encoder and the one decoder (EasyQuant).

    W = scale (w - zero) + S,   S[n, k] = sum over the entries of row n at place k of value * multiplier

S is stored as a sliced ELLPACK of 16 rows, so that lane r of a vector is row 16 b + r of panel b, as in the dense
part. With `Np = ceil(N, 16)` and J_b the largest number of entries of a row of panel b:

    offsets  int32    [Np/16 + 1]   offsets[b] = J_0 + ... + J_(b-1)
    places   uint16   [J, 16]       J = offsets[Np/16]; places[offsets[b] + j, r] = k of entry j of row 16 b + r
    values   float16  [J, 16]       the entry's value / multiplier, at the same index

Entries of a row are ordered by place. A row with fewer than J_b entries repeats its last place (0 where it has none)
with the value 0. `multiplier` is a power of two, an attribute of the operator, chosen so that the largest stored
value lies in [0.5, 1): float16 then keeps full precision over a ratio of 8000. 32 bits an entry: rows of one panel
with equally many cost nothing more.

Example (N = 2, K = 9, multiplier 1; row 0: 0.5 at 3 and -0.25 at 8; row 1: 0.75 at 2): offsets 0 2; places
`3 2 0 ... 0`, `8 2 0 ... 0`; values `0.5 0.75 0 ... 0`, `-0.25 0 0 ... 0`.

Packing and unpacking are exact (BITWISE); values are rounded to float16 before (`storable_values`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .packing import LANES, ceil_to

LARGEST_K = 1 << 16
"""Inputs that a place can name."""


@dataclass(frozen=True)
class PackedOutliers:
    """Tensors of the outliers of one matrix, shaped as in the module's docstring."""

    places: Tensor
    values: Tensor
    offsets: Tensor
    multiplier: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.places, self.values, self.offsets))


def outlier_bytes(n: int, each: int) -> int:
    """Bytes of the encoding of `each` outliers in every one of n rows."""
    rows = ceil_to(n, LANES)
    return rows * each * 4 + 4 * (rows // LANES + 1)


def storable_values(values: Tensor) -> tuple[Tensor, float]:
    """Values (float) as float16 `values / multiplier`, and the power-of-two multiplier."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    multiplier = 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
    return (values.double() / multiplier).to(torch.float16), multiplier


def pack_outliers(places: Tensor, values: Tensor, k: int, multiplier: float) -> PackedOutliers:
    """Encode the entries of every row: places (integers) and values (float16) `[N, J]`.

    A row with fewer than J entries is filled up with zeros (entries of value 0 are not stored). Raises InputError for
    places outside of the matrix and for values that are no finite float16.
    """
    if places.shape != values.shape or places.dim() != 2 or values.dtype != torch.float16:
        raise InputError(
            "Outliers to pack have the wrong type",
            expected="places and float16 values, both [N, J]",
            got=f"{places.dtype} {list(places.shape)}, {values.dtype} {list(values.shape)}",
        )
    at = places.to(torch.int64)
    if k > LARGEST_K or (at.numel() and (int(at.min()) < 0 or int(at.max()) >= k)):
        raise InputError(
            "Outliers lie outside of their matrix",
            expected=f"places 0..{min(k, LARGEST_K) - 1} (at most {LARGEST_K} inputs)",
            got=f"{k} inputs" + (f", places {int(at.min())}..{int(at.max())}" if at.numel() else ""),
        )
    if not torch.isfinite(values).all():
        raise InputError(
            "Outliers are not finite in float16",
            expected="float16 values (outlier_packing.storable_values)",
            got=f"{int((~torch.isfinite(values)).sum())} of {values.numel()} infinite or NaN",
        )
    n = at.shape[0]
    rows = ceil_to(n, LANES)
    # Entries in front, by place; what is not stored behind them, with the last place.
    order = torch.where(values != 0, at, LARGEST_K).sort(dim=1, stable=True)
    at, sorted_values = order.values, values.gather(1, order.indices)
    counts = (at < LARGEST_K).sum(1)
    last = at.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)) if at.shape[1] else at
    at = torch.where(at < LARGEST_K, at, torch.where(last < LARGEST_K, last, 0))
    counts = F.pad(counts, (0, rows - n)).reshape(-1, LANES)
    at, sorted_values = (F.pad(t, (0, 0, 0, rows - n)) for t in (at, sorted_values))
    steps = counts.amax(1)
    slices = range(rows // LANES)

    def sliced(t: Tensor) -> Tensor:
        parts = [t[LANES * b : LANES * (b + 1), : int(steps[b])].T for b in slices]
        return torch.cat(parts).contiguous()

    return PackedOutliers(
        places=sliced(at).to(torch.uint16),
        values=sliced(sorted_values),
        offsets=F.pad(steps.cumsum(0), (1, 0)).to(torch.int32),
        multiplier=multiplier,
    )


def outlier_rows(places: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_outliers` for all padded rows: places int64 and values float16 `[Np, J]`, filled up with
    zeros."""
    steps = offsets.diff().tolist()
    widest = max(steps, default=0)
    parts = zip(places.to(torch.int64).split(steps), values.split(steps), strict=True)
    both = [[F.pad(part.T, (0, widest - part.shape[0])) for part in pair] for pair in parts]
    return torch.cat([at for at, _ in both]), torch.cat([v for _, v in both])


def spread(places: Tensor, values: Tensor, multiplier: float, k: int, dtype: torch.dtype) -> Tensor:
    """S of the module's docstring from rows of entries: `[N, J]` → `[N, k]` of `dtype`."""
    dense = torch.zeros(places.shape[0], k, dtype=dtype)
    return dense.scatter_add(1, places.to(torch.int64), values.to(dtype) * multiplier)


def unpack_outliers(
    places: Tensor, values: Tensor, offsets: Tensor, n: int, k: int, multiplier: float, dtype: torch.dtype
) -> Tensor:
    """Decode to S `[n, k]` of `dtype`: the truth every kernel answers to."""
    return spread(*outlier_rows(places, values, offsets), multiplier, k, dtype)[:n]
