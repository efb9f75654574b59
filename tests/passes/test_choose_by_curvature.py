"""The quadratic model: its curvature is the Fisher information, its minimum is found, and its transforms fold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.dialect import quantize_dequantize
from isofold.compiler.recipe import ActivationFormat, Recipe, WeightFormat
from isofold.passes import choose_by_curvature as module
from isofold.passes.choose_by_curvature import activation_noise
from isofold.passes.site_curvature import measure_curvature
from isofold.passes.sites import Site, find_sites
from isofold.passes.stiefel import orthogonality_error

RECIPE = Recipe(weights=WeightFormat(bits=4), activations=ActivationFormat(mode="dynamic", bits=4))


class Head(nn.Module):
    """Ids, a table, and a linear to logits over the ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.out = nn.Embedding(64, 32), nn.Linear(32, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids))


def test_curvature_of_logits_is_the_fisher_information() -> None:
    model = Head().eval()
    ids = torch.randint(0, 64, (40, 500), generator=torch.Generator().manual_seed(0))
    program = canonicalize(capture(model, (ids,))).program
    sites = find_sites(program, RECIPE)
    found = measure_curvature(program, sites, [(ids,)])[sites[0].name]
    x = model.table(ids).flatten(0, 1).detach().double()
    p = model(ids).flatten(0, 1).detach().double().softmax(-1)
    behind = torch.diag(p.mean(0)) - p.mT @ p / len(p)
    w = model.out.weight.detach().double()
    torch.testing.assert_close(found.value.square, x.mT @ x / len(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.value.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    # 20,000 drawn labels
    outputs = found.outputs[sites[0].name].square
    assert (outputs - behind).norm() < 0.15 * behind.norm()
    # Per token, not the product of means, so it is computed token by token here.
    exact = torch.einsum("tn,nk,nj->kj", p, w, w) - (p @ w).mT @ (p @ w)
    assert (found.gradient.square - exact / len(p)).norm() < 0.15 * exact.norm() / len(p)


def test_curvature_of_other_outputs_is_that_of_the_relative_error() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(32, 64, bias=False).eval()
    x = torch.randn(12000, 32)
    program = canonicalize(capture(layer, (x,))).program
    sites = find_sites(program, RECIPE)
    found = measure_curvature(program, sites, [(x,)])[sites[0].name].gradient.square
    w = layer.weight.detach().double()
    exact = w.mT @ w / layer(x).detach().double().square().mean()
    assert (found - exact).norm() < 0.12 * exact.norm()


@pytest.mark.parametrize("channels", [64, 704])
def test_noise_of_activations_is_what_rounding_makes(channels: int) -> None:
    x = torch.randn(4000, channels, generator=torch.Generator().manual_seed(3))
    moved = quantize_dequantize.overload(x, None, "token", 4) - x
    measured = float(moved.square().sum() / x.square().sum())
    assert activation_noise(4, channels) == pytest.approx(measured, rel=0.1)


def readers(s: Tensor, f: Tensor) -> Any:
    n = len(s)
    site = Site("site", "value", "weights", -1, n, ActivationFormat(mode="dynamic", bits=4), ())
    return module._Readers(site, None, torch.zeros(n, dtype=torch.float64), s, f)


def scaled_loss(reader: Any, r: Tensor) -> float:
    """Of the best scales in the basis of R."""
    s, f = (r @ m @ r.mT for m in (reader.covariance, reader.curvature))
    return float((s.diagonal() * f.diagonal()).sqrt().sum().square())


def test_the_rotation_reaches_the_bound_where_one_basis_holds_both() -> None:
    """Values and curvature with one eigenbasis, in opposite orders: the bound of general transforms is reached."""
    g = torch.Generator().manual_seed(4)
    n = 24
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(0, 3, n, dtype=torch.float64)
    s, f = q.mT @ torch.diag(eigenvalues) @ q, q.mT @ torch.diag(eigenvalues.flip(0)) @ q
    reader = readers(s, f)
    found = module._best_rotation([reader], [])
    assert orthogonality_error(found) < 1e-9
    bound = float((eigenvalues * eigenvalues.flip(0)).sqrt().sum().square())
    random = scaled_loss(reader, torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0])
    assert scaled_loss(reader, found) < 1.02 * bound < 0.5 * random


def test_one_rotation_serves_several_sites() -> None:
    """Bases that differ: the sum falls below that of either site's own basis."""
    g = torch.Generator().manual_seed(5)
    n = 16
    sites = []
    for _ in range(2):
        a, b = (torch.randn(n, n, generator=g, dtype=torch.float64) for _ in range(2))
        weights = torch.logspace(0, 1.5, n, dtype=torch.float64)
        sites.append(readers(a * weights @ a.mT, b * weights @ b.mT))
    found = module._best_rotation(sites, [])
    own = [torch.linalg.eigh(r.curvature).eigenvectors.mT for r in sites]
    total = sum(scaled_loss(r, found) for r in sites)
    assert total < min(sum(scaled_loss(r, basis) for r in sites) for basis in [*own, torch.eye(n).double()])


def test_rows_of_writers_are_kept_from_what_the_loss_feels() -> None:
    """Writers alone: the sum over rows is least with energy and curvature in opposite orders."""
    eigenvalues = torch.logspace(0, 2, 12, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64))[
        0
    ]
    writer = module._Writer(torch.diag(eigenvalues), q.mT @ torch.diag(eigenvalues) @ q)
    nothing = readers(torch.eye(12).double() * 1e-3, torch.eye(12).double())

    def loss(r: Tensor) -> float:
        return float(((r @ writer.energy @ r.mT).diagonal() * (r @ writer.curvature @ r.mT).diagonal()).sum())

    assert loss(module._best_rotation([nothing], [writer])) < loss(torch.eye(12).double())
