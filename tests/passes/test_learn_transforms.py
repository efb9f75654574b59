"""Learning on a tiny decoder: never worse than its start, on the manifold, and the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.hadamard_orders import factor
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Fold, Recipe
from isofold.compiler.spaces.analysis import analyse
from isofold.compiler.spaces.atoms import Group
from isofold.models import registry
from isofold.passes import learn_transforms as learn_transforms_module
from isofold.passes.choose_by_curvature import Chosen
from isofold.passes.choose_rotations import choose_rotations
from isofold.passes.fold_norm_affine import fold_norm_affine
from isofold.passes.fold_rotation import fold_rotation
from isofold.passes.fold_transforms import sites_to_transform
from isofold.passes.learn_transforms import Learned, learn_transforms
from isofold.passes.sites import EdgeTransform, find_sites

RECIPE = PRESETS["w4a4kv4-learned"]
FOLD = Fold(rotation="learned", scale="learned", shift="learned", steps=3)
LONG = FOLD.model_copy(update={"steps": 100})


@pytest.fixture(scope="module")
def llama() -> Program:
    case = registry.get("llama")
    return fold_norm_affine(canonicalize(capture(case.module, case.args)).program).program


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(4)
    case = registry.get("llama")
    return [tuple(torch.randint(3, 160, a.shape, generator=g) for a in case.args) for _ in range(2)]


def learn(program: Program, fold: Fold = FOLD, recipe: Recipe = RECIPE) -> Learned:
    return learn_transforms(
        program,
        recipe,
        fold,
        batches(),
        hadamard=lambda sites, spaces: sites_to_transform(sites, spaces, fold),
    )


@pytest.fixture(scope="module")
def learned(llama: Program) -> Learned:
    return learn(llama)


def test_the_loss_falls(llama: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a start that is not the minimum, gradients reach what they should: rounding noise would not lower it."""

    def hadamard(
        program: Program, spaces: Any, sites: Any, fold: Fold, calibration: Any, **names: Any
    ) -> Any:
        edges = {
            site.name: EdgeTransform(hadamard=factor(site.channels) if site.name in names["hadamard"] else ())
            for site in sites
        }
        return Chosen(choose_rotations(spaces, "hadamard", fold.seed), edges)

    monkeypatch.setattr(learn_transforms_module, "choose_by_curvature", hadamard)
    found = learn(llama, LONG)
    assert len(found.losses) == LONG.steps
    assert all(loss > 0 for loss in found.losses)
    assert 0 < found.after < 0.95 * found.before


def test_the_start_is_better_than_hadamard_matrices(llama: Program) -> None:
    """The minimum of the quadratic model, before any step (0.038 and 0.047 where this was written)."""
    turned = FOLD.model_copy(update={"steps": 0, "rotation": "hadamard", "scale": "none"})
    hadamard = learn(llama, turned)
    assert learn(llama, FOLD.model_copy(update={"steps": 0})).before < 0.9 * hadamard.before


def test_a_loss_that_rose_takes_the_start_back(llama: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far too long end above the start, so what comes back is the start itself."""
    monkeypatch.setattr(learn_transforms_module, "SCALE_RATE", 1.0)
    found = learn(llama)
    assert found.after == found.before
    start = learn(llama, FOLD.model_copy(update={"steps": 0})).rotations
    turned = {name: matrix for name, matrix in found.rotations.items() if name in start}
    assert set(turned) == set(start)
    for name, matrix in turned.items():
        torch.testing.assert_close(matrix, start[name], rtol=0, atol=1e-6)


def test_without_steps_the_start_is_what_comes_back(llama: Program) -> None:
    """Nothing random is left in it but the values' Hadamard matrices; scales follow from the curvature."""
    found = learn(llama, FOLD.model_copy(update={"steps": 0}))
    assert not found.losses
    assert found.after == found.before
    hadamard = choose_rotations(analyse(llama), "hadamard", FOLD.seed)
    groups = {space.name: space.group for space in analyse(llama).spaces}
    for name, matrix in hadamard.items():
        moved = float((found.rotations[name] - matrix).abs().max())
        assert (moved > 0.1) == (groups[name] == Group.ORTHOGONAL)
    assert any(float(e.scale.log().std()) > 0.1 for e in found.edges.values() if e.scale is not None)


def test_rotations_are_orthogonal_to_float64(llama: Program, learned: Learned) -> None:
    spaces = {space.name: space for space in analyse(llama).spaces}
    groups = {spaces[name].group for name in learned.rotations}
    assert Group.ORTHOGONAL in groups
    assert Group.PAIR in groups
    for name, matrix in learned.rotations.items():
        assert matrix.dtype == torch.float64
        eye = torch.eye(spaces[name].size, dtype=torch.float64)
        assert (matrix @ matrix.mT - eye).abs().max() < 1e-9


def test_what_is_learned_folds_without_changing_the_program(llama: Program, learned: Learned) -> None:
    result = fold_rotation(llama, rotations=learned.rotations)
    assert len(result.report.applied) == len(learned.rotations)
    assert not result.report.refused
    assert relative_error(llama.run_float64(), result.program.run_float64()) < 2e-5


def test_every_site_has_a_transform(llama: Program, learned: Learned) -> None:
    sites = {site.name: site for site in find_sites(llama, RECIPE)}
    assert set(learned.edges) == set(sites)
    for name, edge in learned.edges.items():
        assert edge.scale is not None
        assert len(edge.scale) == sites[name].channels
        assert edge.scale.min() > 0
    # All but the two that read values of attention.
    assert sum(bool(edge.hadamard) for edge in learned.edges.values()) == len(sites) - 2


def test_the_same_seed_learns_the_same(llama: Program, learned: Learned) -> None:
    again = learn(llama)
    assert again.losses == learned.losses
    for name, matrix in learned.rotations.items():
        assert torch.equal(again.rotations[name], matrix)
    for name, edge in learned.edges.items():
        assert torch.equal(again.edges[name].scale, edge.scale)  # type: ignore[arg-type]  # set above
    other = learn(llama, FOLD.model_copy(update={"seed": 1}))
    assert any(not torch.equal(other.rotations[name], matrix) for name, matrix in learned.rotations.items())


def test_only_what_is_asked_for_is_learned(llama: Program) -> None:
    fold = Fold(rotation="none", scale="learned", shift="none", steps=2)
    found = learn(llama, fold)
    assert not found.rotations
    assert all(edge.shift is None and not edge.hadamard for edge in found.edges.values())
    scales = [edge.scale for edge in found.edges.values() if edge.scale is not None]
    assert any(not torch.equal(scale, torch.ones_like(scale)) for scale in scales)


def test_the_program_is_not_changed(llama: Program) -> None:
    before: dict[str, Tensor] = {name: held.clone() for name, held in llama.parameters.items()}
    learn(llama, FOLD.model_copy(update={"steps": 1}))
    for name, held in llama.parameters.items():
        assert torch.equal(held, before[name])
