"""Riemannian Adam: parameters stay on their manifold, and known optima are found."""

from __future__ import annotations

import pytest
import torch

from isofold.compiler.errors import InputError
from isofold.passes.stiefel import RiemannianAdam, orthogonality_error, retract, to_tangent


def random_orthogonal(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(*sizes, generator=g, dtype=torch.float64))[0].to(dtype)


def procrustes(rows: int = 64, width: int = 12) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the least |A O - B|^2 over orthogonal O, known from the SVD of A^T B (Schoenemann 1966)."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(rows, width, generator=g, dtype=torch.float64)
    b = a @ random_orthogonal(width, width, dtype=torch.float64)
    b = b + 0.3 * torch.randn(rows, width, generator=g, dtype=torch.float64)
    u, _, v = torch.linalg.svd(a.T @ b)
    return a, b, float((a @ u @ v - b).square().sum())


def start(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """An orthogonal matrix in the same component (sign of the determinant) as the optimum."""
    u, _, v = torch.linalg.svd(a.T @ b)
    o = torch.eye(len(u), dtype=a.dtype)
    o[0, 0] = torch.linalg.det(u @ v).sign()
    return o


def test_procrustes_converges_to_the_known_optimum_and_stays_orthogonal() -> None:
    a, b, optimum = procrustes()
    o = start(a, b).float().requires_grad_()
    optimizer = RiemannianAdam([o], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    first = None
    for _ in range(400):
        optimizer.zero_grad()
        loss = (a @ o.double() - b).square().sum()
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        schedule.step()
        assert orthogonality_error(o) < 1e-6
    assert first is not None
    assert first > 5 * optimum
    assert float((a @ o.detach().double() - b).square().sum()) < optimum * (1 + 1e-4)


def test_it_beats_adam_with_projection_on_a_nonconvex_problem() -> None:
    """Eigenvectors in order (Brockett): least tr(D O^T S O) pairs large entries of D with small eigenvalues."""
    g = torch.Generator().manual_seed(1)
    m = torch.randn(16, 16, generator=g, dtype=torch.float64)
    s, d = m @ m.T, torch.arange(1.0, 17.0, dtype=torch.float64)
    optimum = float((torch.linalg.eigvalsh(s).flip(0) * d).sum())

    def run(riemannian: bool, lr: float) -> float:
        o = random_orthogonal(16, 16, dtype=torch.float64).requires_grad_()
        optimizer = RiemannianAdam([o], lr=lr) if riemannian else torch.optim.Adam([o], lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            optimizer.zero_grad()
            ((s @ o) * o).sum(0).mul(d).sum().backward()
            optimizer.step()
            schedule.step()
            if not riemannian:
                with torch.no_grad():
                    u, _, v = torch.linalg.svd(o)
                    o.copy_(u @ v)
        return float(((s @ o) * o).detach().sum(0).mul(d).sum())

    ours = run(True, 0.8)
    assert ours < optimum * 1.01
    assert all(ours < run(False, lr) for lr in (0.005, 0.02, 0.1))


def test_batches_of_tall_matrices_stay_orthonormal() -> None:
    o = random_orthogonal(3, 10, 4).requires_grad_()
    target = torch.randn(3, 10, 4)
    optimizer = RiemannianAdam([o], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (o - target).square().sum().backward()
        optimizer.step()
    assert orthogonality_error(o) < 1e-6
    # The optimum of |O - T|^2 is the polar factor of T.
    u, _, v = torch.linalg.svd(target, full_matrices=False)
    assert float((o - u @ v).detach().abs().max()) < 0.02


def test_positive_scales_stay_positive_and_reach_their_optimum() -> None:
    s = torch.ones(5, requires_grad=True)
    target = torch.tensor([1e-4, 0.1, 1.0, 20.0, 300.0])
    optimizer = RiemannianAdam([{"params": [s], "manifold": "positive"}], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        (s / target).log().square().sum().backward()
        optimizer.step()
        schedule.step()
        assert bool((s > 0).all())
    assert torch.allclose(s, target, rtol=1e-2)


def test_one_optimizer_takes_groups_of_both_kinds() -> None:
    o, s = torch.eye(6).requires_grad_(), torch.ones(6, requires_grad=True)
    true_o, true_s = random_orthogonal(6, 6), torch.rand(6) + 0.5
    if torch.linalg.det(true_o) < 0:
        true_o[:, 0] *= -1
    x = torch.randn(100, 6)
    optimizer = RiemannianAdam(
        [{"params": [o], "lr": 0.2}, {"params": [s], "lr": 0.05, "manifold": "positive"}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        ((x @ o * s) - (x @ true_o * true_s)).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert float((x @ o * s - x @ true_o * true_s).detach().square().mean()) < 1e-4


def test_retraction_keeps_the_point_and_tangents_are_tangent() -> None:
    o = random_orthogonal(8, 5, dtype=torch.float64)
    assert torch.allclose(retract(o, torch.zeros_like(o)), o, atol=1e-12)
    t = to_tangent(o, torch.randn(8, 5, dtype=torch.float64))
    assert float((o.T @ t + t.T @ o).abs().max()) < 1e-12
    # A retraction agrees with the straight line to first order.
    assert float((retract(o, 1e-5 * t) - o - 1e-5 * t).abs().max()) < 1e-8


@pytest.mark.parametrize(
    ("parameter", "manifold", "message"),
    [
        (torch.ones(3, 3), "stiefel", "orthonormal"),
        (torch.eye(4)[:2], "stiefel", "orthonormal"),
        (torch.tensor([1.0, -1.0]), "positive", "not positive"),
        (torch.ones(2), "sphere", "Unknown manifold"),
    ],
)
def test_parameters_off_their_manifold_are_refused(
    parameter: torch.Tensor, manifold: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        RiemannianAdam([parameter.requires_grad_()], manifold=manifold)
