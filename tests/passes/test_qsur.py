"""QSUR: against counting points, known shapes, and what transforms do to it."""

from __future__ import annotations

import math

import pytest
import torch

from isofold.compiler.hadamard import hadamard_matrix
from isofold.compiler.hadamard_orders import factor
from isofold.passes.qsur import Moments, chi_square_quantile, qsur_root


def moments(d: int = 6) -> Moments:
    g = torch.Generator().manual_seed(0)
    m = torch.randn(d, d, generator=g, dtype=torch.float64)
    return Moments(torch.randn(d, generator=g, dtype=torch.float64), m @ m.T + 0.1 * torch.eye(d).double())


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 6.634897), (2, 9.210340), (10, 23.209251), (384, 451.394735)]
)
def test_chi_square_quantiles_are_the_tabulated_ones(degrees: int, expected: float) -> None:
    assert chi_square_quantile(degrees, 0.99) == pytest.approx(expected, rel=1e-4)


def test_it_is_the_share_of_the_cube_inside_the_ellipsoid() -> None:
    m = Moments(torch.tensor([0.5, -0.3, 0.1]).double(), moments(3).covariance)
    c = chi_square_quantile(3, 0.99)
    extent = (c * m.covariance.diagonal()).sqrt()
    low, high = float((m.mean - extent).min()), float((m.mean + extent).max())
    g = torch.Generator().manual_seed(0)
    points = torch.rand(400_000, 3, generator=g, dtype=torch.float64) * (high - low) + low - m.mean
    inside = ((points @ torch.linalg.inv(m.covariance)) * points).sum(1) <= c
    assert qsur_root(m) == pytest.approx(float(inside.double().mean()) ** (1 / 3), rel=0.02)


def test_a_ball_at_zero_is_the_best_there_is() -> None:
    d = 16
    ball = Moments(torch.zeros(d).double(), torch.eye(d).double())
    best = math.exp((d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)) / d) / 2
    assert qsur_root(ball) == pytest.approx(best, rel=1e-9)
    assert qsur_root(moments(d)) < best


def test_shift_and_scale_that_even_channels_raise_it_and_rotation_keeps_the_volume() -> None:
    m = moments()
    uneven = m.scaled(scale=torch.tensor([1.0, 1, 1, 1, 1, 0.02]))
    assert qsur_root(uneven) < qsur_root(m)
    assert qsur_root(m.scaled(shift=m.mean)) > qsur_root(m)
    evened = m.scaled(m.covariance.diagonal().sqrt(), m.mean)
    assert qsur_root(evened) > qsur_root(m.scaled(shift=m.mean))
    _, vectors = torch.linalg.eigh(m.covariance)
    whitened = m.scaled(shift=m.mean).rotated(vectors)
    ball = whitened.scaled(whitened.covariance.diagonal().sqrt())
    sphere = Moments(torch.zeros(6).double(), torch.eye(6).double())
    assert qsur_root(ball) == pytest.approx(qsur_root(sphere), rel=1e-9)


def test_data_that_does_not_span_its_channels_stays_finite() -> None:
    covariance = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]).double())
    assert 0 < qsur_root(Moments(torch.zeros(4).double(), covariance)) < 0.1
    assert qsur_root(Moments(torch.ones(4).double(), torch.zeros(4, 4).double())) == 0.0


def test_a_hadamard_transform_is_the_rotation_by_its_matrix() -> None:
    m = moments(12)
    by_matrix, by_factors = m.rotated(hadamard_matrix(12)), m.hadamard(factor(12))
    assert torch.allclose(by_factors.mean, by_matrix.mean)
    assert torch.allclose(by_factors.covariance, by_matrix.covariance)
    outlier = m.scaled(torch.tensor([1.0] * 11 + [0.01]))
    assert qsur_root(outlier.hadamard(factor(12))) > qsur_root(outlier)
