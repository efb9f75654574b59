"""Outliers as a sliced ELLPACK: the index formula, round trips, what is refused."""

from __future__ import annotations

import pytest
import torch

from isofold.compiler.dialect.outlier_packing import (
    outlier_bytes,
    outlier_rows,
    pack_outliers,
    spread,
    storable_values,
    unpack_outliers,
)
from isofold.compiler.errors import InputError


def entries(n: int, k: int, each: int, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and float16 values `[n, each]`; about `share` of them are not zero."""
    g = torch.Generator().manual_seed(n * k + each)
    places = torch.stack([torch.randperm(k, generator=g)[:each] for _ in range(n)])
    values = torch.randn(n, each, generator=g).half()
    return places, values * (torch.rand(n, each, generator=g) < share)


def test_the_example_of_the_docstring() -> None:
    places, values = torch.tensor([[8, 3], [2, 0]]), torch.tensor([[-0.25, 0.5], [0.75, 0.0]]).half()
    p = pack_outliers(places, values, 9, 1.0)
    assert p.offsets.tolist() == [0, 2]
    assert p.places.int().tolist() == [[3, 2] + 14 * [0], [8, 2] + 14 * [0]]
    assert p.values.tolist() == [[0.5, 0.75] + 14 * [0.0], [-0.25] + 15 * [0.0]]


@pytest.mark.parametrize(
    ("n", "k", "each"), [(1, 1, 1), (16, 32, 3), (17, 33, 33), (40, 300, 7), (3, 65536, 2)]
)
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
def test_packing_is_the_index_formula_and_unpacks_to_the_same(
    n: int, k: int, each: int, share: float
) -> None:
    places, values = entries(n, k, each, share)
    p = pack_outliers(places, values, k, 2.0)
    expected = spread(places, values, 2.0, k, torch.float64)
    for row in range(n):
        b, r = divmod(row, 16)
        kept = sorted((int(at), float(v)) for at, v in zip(places[row], values[row], strict=True) if v != 0)
        start, end = int(p.offsets[b]), int(p.offsets[b + 1])
        found = [(int(p.places[j, r]), float(p.values[j, r])) for j in range(start, end)]
        assert found[: len(kept)] == kept
        assert all(entry == (kept[-1][0] if kept else 0, 0.0) for entry in found[len(kept) :])
    assert torch.equal(unpack_outliers(p.places, p.values, p.offsets, n, k, 2.0, torch.float64), expected)
    at, held = outlier_rows(p.places, p.values, p.offsets)
    again = pack_outliers(at, held, k, 2.0)
    for name in ("places", "values", "offsets"):
        assert torch.equal(getattr(again, name), getattr(p, name))


def test_equal_rows_cost_32_bits_an_outlier() -> None:
    places, values = entries(48, 500, 5)
    assert pack_outliers(places, values, 500, 1.0).nbytes == 48 * 5 * 4 + 4 * 4 == outlier_bytes(48, 5)


def test_values_keep_full_precision_at_any_size() -> None:
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).clamp(min=1e-3)
    for size in (1e-30, 1e-6, 1.0, 1e30):
        stored, multiplier = storable_values(values * size)
        error = (stored.double() * multiplier / (values * size).double() - 1).abs().max()
        assert float(error) <= 2**-10.9
    assert storable_values(torch.zeros(2, 2))[1] == 1.0


@pytest.mark.parametrize(
    ("places", "values", "k", "message"),
    [
        ([[9]], [[1.0]], 9, "outside of their matrix"),
        ([[-1]], [[1.0]], 9, "outside of their matrix"),
        ([[0]], [[1.0]], 65537, "at most 65536 inputs"),
        ([[0]], [[float("inf")]], 9, "not finite"),
        ([[0]], [[float("nan")]], 9, "not finite"),
        ([[0, 1]], [[1.0]], 9, "wrong type"),
    ],
)
def test_what_cannot_be_stored_is_refused(places: list, values: list, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_outliers(torch.tensor(places), torch.tensor(values).half(), k, 1.0)
