"""Folds, solvers and pruning cross layers of experts: identities over the reals, chosen by what experts read.

Qwen3-MoE: gate and up in blocks, no biases. GPT-OSS: in turn, clamped, with biases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.dialect import hadamard, linear_grouped
from isofold.compiler.driver import REAL_TOLERANCE, Step, relative_error, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Fold, Prune, Recipe, WeightFormat
from isofold.compiler.spaces.analysis import analyse
from isofold.models import gpt_oss, qwen3_moe
from isofold.models.decoder import causal_language_model
from isofold.passes.choose_by_curvature import choose_by_curvature
from isofold.passes.choose_edges import choose_edges
from isofold.passes.fold_transforms import fold_steps
from isofold.passes.prune_channels import prune_channels
from isofold.passes.quantize_weights import quantize_weights
from isofold.passes.shrink_channels import shrink_channels
from isofold.passes.site_curvature import measure_curvature
from isofold.passes.site_error import SiteError
from isofold.passes.site_statistics import measure
from isofold.passes.sites import EdgeTransform, Site, find_sites
from isofold.passes.solve_gptq import Read, input_products

W4A8 = PRESETS["w4a8"]


@pytest.fixture(scope="module", params=("qwen3_moe", "gpt_oss"))
def program(request: pytest.FixtureRequest) -> Program:
    """One layer."""
    if request.param == "qwen3_moe":
        config = hf.Qwen3MoeConfig(**{**qwen3_moe.SIZES["tiny"], "num_hidden_layers": 1})
        case = causal_language_model("", hf.Qwen3MoeForCausalLM, config, "sdpa", 0)
    else:
        config = hf.GptOssConfig(**{**gpt_oss.SIZES["tiny"], "num_hidden_layers": 1})
        case = causal_language_model("", hf.GptOssForCausalLM, config, "eager", 0)
    return canonicalize(capture(case.module, case.args)).program


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(3, 160, (2, 9), generator=generator),) for _ in range(3)]


def run(program: Program, recipe: Recipe, calibration: Any = None) -> tuple[Program, dict[str, PassReport]]:
    after, reports = run_steps(program, fold_steps(recipe, calibration))
    for report in reports:
        if report.applied:
            assert report.error is not None
            assert report.error <= REAL_TOLERANCE
    assert relative_error(program.run_float64(), after.run_float64()) < 5e-5
    return after, {report.name: report for report in reports}


def of_experts(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.readers[0].experts]


def inside_experts(report: PassReport) -> int:
    return sum("experts" in entry.place.module for entry in report.applied)


def test_the_stream_turns_through_experts(program: Program) -> None:
    after, reports = run(program, PRESETS["w4a8-rotate"])
    turned = {name for entry in reports["fold_rotation"].applied for name in entry.facts["parameters"]}
    for part in ("gate_up_proj", "down_proj"):
        assert sum(part in name and "experts" in name and "bias" not in name for name in turned) == 1, part
    # Behind the product of gate and up nothing turns; there the transform is in the graph.
    assert inside_experts(reports["place_hadamards"]) == 1
    behind = [n for n in after.graph.nodes if n.target == linear_grouped.overload]
    assert [argument(n, "input").target == hadamard.overload for n in behind] == [False, True]


@pytest.mark.parametrize("scale", ["smoothquant", "osplus", "awq"])
def test_scales_and_shifts_of_experts(scale: Any, program: Program, batches: Any) -> None:
    """In front of gate and up into the norm; in front of down into up where nothing clamps, else on the edge."""
    fold = Fold(scale=scale, shift="osplus" if scale == "osplus" else "none")
    recipe = W4A8.model_copy(update={"fold": fold})
    sites = of_experts(find_sites(program, recipe))
    assert len(sites) == 2
    choices = choose_edges(program, recipe, scale=scale, calibration=batches)
    errors = [(choices[s.name].error_before, choices[s.name].error_after) for s in sites]
    assert all(after is not None and before is not None and after <= before for before, after in errors)
    assert any(after < 0.99 * before for before, after in errors)
    _, reports = run(program, recipe, batches)
    assert inside_experts(reports["fold_edges"]) or inside_experts(reports["transform_edges"])


def test_samples_of_rows_come_with_their_experts(program: Program, batches: Any) -> None:
    sites = of_experts(find_sites(program, W4A8))
    measured = measure(program, sites, batches)
    for site in sites:
        (reader,) = site.readers
        assert reader.chooser is not None
        rows, ids = measured[site.name].sample[0], measured[site.name].chosen[reader.chooser]
        held: dict[str, Tensor] = {}
        seen: set[tuple[float, int]] = set()
        for batch in batches:
            program.run_observed(lambda node, found, held=held: held.__setitem__(node.name, found), batch, {})
            seen |= {
                (float(x[0]), int(e)) for x, e in zip(held[site.value], held[reader.chooser], strict=True)
            }
        assert {(float(x[0]), int(e)) for x, e in zip(rows, ids, strict=True)} == seen


def test_errors_of_sites_are_those_of_the_operator(program: Program, batches: Any) -> None:
    """What a chooser minimizes is the error of the grouped linear itself, with a transform and its shift."""
    recipe = Recipe(weights=W4A8.weights)
    site = of_experts(find_sites(program, recipe))[0]
    statistics = measure(program, [site], batches)[site.name]
    (reader,) = site.readers
    x, ids = statistics.sample[0], statistics.chosen[reader.chooser or ""]
    weight = reader.weight.unflatten(0, (reader.experts, -1))
    generator = torch.Generator().manual_seed(1)
    transform = EdgeTransform(torch.rand(site.channels, generator=generator) + 0.5, statistics.mean)
    rounded = reader.rounded(transform.fold(reader.weight).float()).unflatten(0, weight.shape[:2])
    offset = transform.offset(reader.weight)
    assert offset is not None
    bias = offset.float().unflatten(0, weight.shape[:2])
    wanted = linear_grouped.overload(x, ids, weight)
    error = linear_grouped.overload(transform.apply(x), ids, rounded, bias) - wanted
    relative = (error.square().sum(1) / wanted.square().sum(1)).mean()
    assert SiteError(site, statistics)(transform) == pytest.approx(float(relative), rel=1e-4)


def test_curvature_of_experts_is_felt_where_their_rows_go(program: Program, batches: Any) -> None:
    sites = find_sites(program, W4A8)
    measured = measure_curvature(program, sites, batches)
    for site in of_experts(sites):
        (reader,) = site.readers
        felt = measured[site.name].felt[reader.node].unflatten(0, (reader.experts, -1))
        torch.testing.assert_close(felt.sum(0), measured[site.name].outputs[reader.node].square.diagonal())
    spaces, fold = analyse(program), Fold(rotation="learned", scale="learned", steps=0)
    chosen = choose_by_curvature(
        program, spaces, sites, fold, batches, hadamard={site.name for site in of_experts(sites)}
    )
    assert all(chosen.edges[site.name].scale is not None for site in of_experts(sites))


def test_gptq_rounds_each_expert_by_its_own_rows(program: Program, batches: Any) -> None:
    node = next(n for n in program.graph.nodes if n.target == linear_grouped.overload)
    x, expert, weight = (argument(node, name) for name in ("input", "expert", "weight"))
    count = len(program.tensors[str(weight.target)])
    found = input_products(program, {"w": [Read(x.name, expert.name, count)]}, batches[:1])["w"]
    held: dict[str, Tensor] = {}
    program.run_observed(lambda node, found: held.__setitem__(node.name, found), batches[0], {})
    rows, ids = held[x.name], held[expert.name]
    k = rows.shape[1]
    for e in range(count):
        own = rows[ids == e]
        wanted = (own.mT @ own + k * (rows.mT @ rows) / len(rows)) / (len(own) + k)
        torch.testing.assert_close(found[e], wanted, rtol=1e-4, atol=1e-6)

    def error(solver: Any) -> float:
        """Of the first linear's results on what it was calibrated with."""
        form = WeightFormat(bits=3, group_size=32, symmetric=False, solver=solver)
        options = {"recipe": Recipe(weights=form), "calibration": batches[:1]}
        done, reports = run_steps(program, [Step(quantize_weights, options)])
        inside = [e for e in reports[0].applied if "experts" in e.place.module]
        assert [e.facts["solver"] for e in inside] == [solver] * 2
        after = next(n for n in done.graph.nodes if n.target == linear_grouped.overload)
        found: dict[str, Tensor] = {}
        done.run_observed(lambda node, value: found.__setitem__(node.name, value), batches[0], {})
        rounded = linear_grouped.overload(rows, ids, found[argument(after, "weight").name])
        wanted = linear_grouped.overload(rows, ids, program.tensors[str(weight.target)].detach())
        return float((rounded - wanted).norm() / wanted.norm())

    assert error("gptq") < 0.8 * error("nearest")


@pytest.mark.parametrize("criterion", ["magnitude", "activation"])
def test_hidden_channels_of_experts_are_pruned(criterion: Any, program: Program, batches: Any) -> None:
    recipe = Recipe(prune=Prune(structure="channels", fraction=0.34, criterion=criterion))
    after, reports = run_steps(
        program,
        [
            Step(prune_channels, {"recipe": recipe, "calibration": batches}),
            Step(shrink_channels),
        ],
    )
    assert [e.facts["channels_after"] for e in reports[0].applied] == [32]
    assert len(reports[1].applied) == 1
    shapes = [tuple(held.shape[1:]) for held in after.tensors.values() if held.dim() == 3]
    assert shapes.count((64, 64)) == 1
    assert shapes.count((64, 32)) == 1
