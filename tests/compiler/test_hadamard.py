"""Hadamard matrices: every construction, the split of sizes, and transforms factor by factor."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch

from isofold.compiler.errors import InputError
from isofold.compiler.hadamard import apply_hadamard, hadamard_matrix, randomised_hadamard, steps
from isofold.compiler.hadamard_orders import CORES, check_orders, factor, is_power_of_two, signs

UNSYMMETRIC = {44, 68, 92, 116, 132, 140, 156, 172, 212}


@pytest.mark.parametrize("order", [*CORES, 1, 2, 4, 8, 64, 256])
def test_rows_are_orthogonal_signs(order: int) -> None:
    matrix = signs(order).astype(np.int64)
    assert np.array_equal(np.abs(matrix), np.ones((order, order)))
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


def test_the_constructions_reach_all_orders_but_two() -> None:
    assert set(range(12, 253, 8)) - set(CORES) == {188, 236}
    assert {12, 20, 28, 36, 44, 52, 60, 92, 108, 116, 140, 156, 172} <= set(CORES)


def test_most_orders_are_symmetric() -> None:
    assert {m for m in (*CORES, 1, 2, 4, 64) if not np.array_equal(signs(m), signs(m).T)} == UNSYMMETRIC


def test_entries_never_change() -> None:
    """Folded weights on disk need the same matrices."""
    assert zlib.crc32(b"".join(signs(order).tobytes() for order in CORES)) == 246790401


@pytest.mark.parametrize(
    ("n", "orders"),
    [
        (1, ()),
        (7, ()),
        (2, (2,)),
        (30, (2,)),
        (64, (64,)),
        (80, (20, 4)),
        (768, (12, 64)),
        (3072, (12, 256)),
        (8960, (28, 20, 16)),
        (11008, (172, 64)),
        (13824, (12, 12, 12, 8)),
        (14336, (28, 512)),
        (18944, (148, 128)),
        (29568, (44, 28, 12, 2)),
        (376, (8,)),
        (3 * 188, (12,)),
    ],
)
def test_sizes_of_real_models_are_split(n: int, orders: tuple[int, ...]) -> None:
    assert factor(n) == orders
    assert n % math.prod(orders) == 0


def test_every_split_divides_and_is_accepted() -> None:
    for n in range(1, 2000):
        orders = factor(n)
        assert check_orders(orders, n) == orders
        assert math.prod(orders) % (n & -n) == 0  # never less than the power of two in n
        assert all(not is_power_of_two(m) for m in orders[:-1])


@pytest.mark.parametrize("n", [2, 12, 20, 24, 30, 64, 80, 112, 240, 344, 376])
def test_matrix_is_orthogonal_and_is_what_the_transform_applies(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    block = math.prod(factor(n))
    assert torch.allclose(
        matrix[:block, :block].abs(), torch.full((block, block), block**-0.5, dtype=torch.float64)
    )
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    for transpose in (False, True):
        expected = x @ (matrix.T if transpose else matrix)
        assert torch.allclose(apply_hadamard(x, factor(n), transpose), expected, atol=1e-12)
    assert torch.allclose(
        apply_hadamard(apply_hadamard(x, factor(n)), factor(n), transpose=True), x, atol=1e-12
    )


def test_a_transform_is_the_kronecker_product_of_its_orders() -> None:
    expected = np.kron(np.kron(signs(12), signs(20)), signs(4)) / math.sqrt(960)
    assert np.allclose(hadamard_matrix(960, orders=(12, 20, 4)).numpy(), expected)


def test_without_the_transpose_an_unsymmetric_transform_is_not_undone() -> None:
    x = torch.randn(3, 44, dtype=torch.float64)
    assert not torch.allclose(apply_hadamard(apply_hadamard(x, (44,)), (44,)), x, atol=1e-2)


def test_it_is_differentiable() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: apply_hadamard(v, (12, 2)), x)


def test_powers_of_two_are_taken_in_small_steps() -> None:
    assert steps((12, 512)) == [12, 16, 16, 2]
    assert steps((64,)) == [16, 4]
    assert steps(()) == []


def test_random_signs_depend_on_the_seed_alone() -> None:
    first, again, other = (randomised_hadamard(48, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.allclose(first @ first.T, torch.eye(48, dtype=torch.float64), atol=1e-12)
    flips = first @ hadamard_matrix(48).T
    assert torch.allclose(flips, torch.diag(torch.diag(flips).sign()), atol=1e-12)


@pytest.mark.parametrize(
    ("orders", "size", "reason"),
    [
        ((6,), 12, "no Hadamard matrix of this order"),
        ((188,), 188, "no Hadamard matrix of this order"),
        ((4, 12), 48, "wrong places"),
        ((12, 4), 40, "do not fit"),
    ],
)
def test_wrong_orders_are_named(orders: tuple[int, ...], size: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_orders(orders, size)
    with pytest.raises(InputError, match=reason):
        apply_hadamard(torch.zeros(2, size), orders)


def test_a_size_must_be_positive() -> None:
    with pytest.raises(InputError, match="positive"):
        factor(0)
