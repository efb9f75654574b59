"""The folds of recipes as a whole: every step is an identity over the reals, and little is left to run time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import REAL_TOLERANCE, Step, relative_error, run_steps
from isofold.compiler.passes import Guarantee, PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Fold, Recipe
from isofold.models import registry
from isofold.passes.fold_transforms import fold_steps

from ..captured import captured

OPS: Any = torch.ops.isofold


@pytest.fixture(scope="module")
def llama() -> Program:
    case = registry.get("llama")
    return canonicalize(capture(case.module, case.args)).program


@pytest.fixture(scope="module")
def batches() -> list[tuple[torch.Tensor, ...]]:
    case = registry.get("llama")
    return [case.args, case.args]


def run(program: Program, recipe: Recipe, calibration: Any = None) -> tuple[Program, dict[str, PassReport]]:
    after, reports = run_steps(program, fold_steps(recipe, calibration))
    for report in reports:
        assert report.guarantee in (Guarantee.REAL, Guarantee.BITWISE)
        if report.applied:
            assert report.error is not None
            assert report.error <= (REAL_TOLERANCE if report.guarantee == Guarantee.REAL else 0)
    assert relative_error(program.run_float64(), after.run_float64()) < 5e-5
    return after, {report.name: report for report in reports}


def online(program: Program) -> int:
    return sum(node.target is OPS.hadamard.default for node in program.graph.nodes)


def test_rotations_of_a_decoder(llama: Program) -> None:
    after, reports = run(llama, PRESETS["w4a8-rotate"])
    assert list(reports) == [
        *("untie_embeddings", "fold_norm_affine", "center_norms", "balance_scales", "fold_rotation"),
        *("fold_edges", "transform_edges", "absorb_into_norms", "place_hadamards"),
    ]
    assert len(reports["fold_norm_affine"].applied) == 5
    # The stream, and the values of each of the two layers.
    assert len(reports["fold_rotation"].applied) == 3
    # Only behind the gated product of each layer is there no folded rotation.
    assert online(after) == 2
    assert len(reports["place_hadamards"].applied) == 2
    added = after.operator_count - llama.operator_count
    assert added <= 4


def test_online_off_adds_no_operator(llama: Program) -> None:
    after, reports = run(
        llama, Recipe(weights=PRESETS["w4a8"].weights, fold=Fold(rotation="hadamard", online="off"))
    )
    assert online(after) == 0
    assert "place_hadamards" not in reports
    assert after.operator_count <= llama.operator_count


def test_a_quantized_cache_turns_queries_and_keys(llama: Program) -> None:
    after, reports = run(llama, PRESETS["w4a4kv4-rotate"])
    assert online(after) == 2 + 2 * 2
    # Before the rotations, so that what is learned sees it.
    assert list(reports).index("place_hadamards") < list(reports).index("fold_rotation")


def test_what_is_learned_is_folded(llama: Program, batches: list[Any]) -> None:
    fold = PRESETS["w4a4kv4-learned"].fold
    assert fold is not None
    recipe = PRESETS["w4a4kv4-learned"].model_copy(update={"fold": fold.model_copy(update={"steps": 2})})
    after, reports = run(llama, recipe, batches)
    assert len(reports["fold_rotation"].applied) == 3
    # Queries and keys of two layers; inputs of q, gate and down there, and of the head, whose scales are learned.
    assert online(after) == 2 * 2 + 2 * 3 + 1


def test_float_inputs_need_no_online_transform(llama: Program) -> None:
    recipe = PRESETS["w4a16"].model_copy(update={"fold": Fold(rotation="womi")})
    after, reports = run(llama, recipe)
    assert online(after) == 0
    assert reports["fold_rotation"].applied


def test_scales_and_shifts_of_a_decoder(llama: Program, batches: Any) -> None:
    after, reports = run(llama, PRESETS["w8a8-smooth"], batches)
    assert list(reports) == ["balance_scales", "fold_edges", "transform_edges", "absorb_into_norms"]
    assert reports["fold_edges"].applied
    assert online(after) == 0


def test_random_matrices_follow_the_seed(llama: Program) -> None:
    def turned(seed: int) -> torch.Tensor:
        recipe = PRESETS["w4a8"].model_copy(update={"fold": Fold(rotation="hadamard", seed=seed)})
        after, _ = run_steps(llama, fold_steps(recipe, None), verify=False)
        found: torch.Tensor = after.tensors["model.model.layers.0.self_attn.q_proj.weight"]
        return found

    assert torch.equal(turned(0), turned(0))
    assert not torch.allclose(turned(0), turned(1))


def test_no_fold_no_steps() -> None:
    assert fold_steps(PRESETS["w4a8"], None) == []
    assert all(isinstance(step, Step) for step in fold_steps(PRESETS["w4a8-rotate"], None))


@pytest.mark.parametrize(
    ("name", "preset", "step", "count"),
    [
        # The gated output of each layer's scan.
        ("mamba2", "w4a8-rotate", "place_hadamards", 2),
        # Inputs of convolutions: a scale each, on edges that nothing folds.
        ("hifigan", "w8a8-smooth", "transform_edges", 15),
        # Post-norm, so no stream turns: what reads it and the hidden layer, twice.
        ("bert", "w4a8-rotate", "place_hadamards", 6),
    ],
)
def test_edges_where_nothing_folds(name: str, preset: str, step: str, count: int) -> None:
    case, program = captured(name)
    program = canonicalize(program).program
    _, reports = run(program, PRESETS[preset], [case.args, case.args])
    assert len(reports[step].applied) == count
