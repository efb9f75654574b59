"""Zeros in weights are found, named, pruned and skipped; what does not pay stays dense, with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import isofold
from isofold.compiler.capture import capture
from isofold.compiler.dialect.sparse_layouts import HELD
from isofold.compiler.driver import run_steps
from isofold.compiler.errors import RecipeError
from isofold.compiler.html_report import render_html
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, LayerRule, Prune, Recipe, Sparsity, WeightFormat, resolve
from isofold.passes.pipeline import plan
from isofold.passes.prune_weights import kept
from isofold.passes.sparse_candidates import candidates
from isofold.passes.sparse_rates import WIDE
from isofold.passes.sparse_speed import MARGIN, break_even, dense_time, size_of, sparse_time
from isofold.passes.sparsity_patterns import pattern_of
from isofold.runtimes.onnx.export import export_onnx
from isofold.runtimes.onnx.oplib.build import library_path
from isofold.runtimes.onnx.session import open_session

WIDTH = 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def sparse_block(density: float = 0.2) -> Block:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        for index, part in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
            drop = torch.rand(part.weight.shape, generator=torch.Generator().manual_seed(index)) >= density
            part.weight[drop] = 0
    return model


def compiled(model: nn.Module, recipe: Recipe, x: Tensor) -> tuple[Program, dict[str, PassReport]]:
    program = capture(model, (x,), None, None)
    after, reports = run_steps(program, plan(program, recipe))
    return after, {report.name: report for report in reports}


def only(part: type[nn.Module] | Callable[..., nn.Module], matrix: Tensor) -> nn.Module:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0])
    with torch.no_grad():
        linear.weight.copy_(matrix)
    return nn.Sequential(linear).eval()


pytestmark = pytest.mark.usefixtures("wide_rates")


@pytest.mark.parametrize("preset", ["sparse-float32", "sparse-int8"])
def test_every_sparse_linear_of_a_block_skips_its_zeros(
    preset: str, counts: Callable[[Program], dict[str, int]]
) -> None:
    model, x = sparse_block(), random(1, 128, WIDTH)
    after, reports = compiled(model, PRESETS[preset], x)
    found = counts(after)
    report = reports["extract_sparsity"]
    name = "linear_sparse" if preset == "sparse-int8" else "linear_sparse_float"
    assert found[name] == (4 if preset == "sparse-int8" else 6)  # int8: q, k and v are one linear
    assert not found["linear_packed"]
    assert not found["linear"]
    assert not found["gelu"]  # an epilogue
    assert len(report.applied) == found[name]
    for entry in report.applied:
        assert entry.facts["pattern"] == "unstructured"
        assert 0.15 < entry.facts["density"] < 0.25
        assert entry.facts["break_even"] > entry.facts["stored"]
        assert entry.facts["saved_microseconds"] > 0
        chosen = f"{entry.facts['layout']} {entry.facts['values']}"
        assert min(entry.facts["candidates"], key=entry.facts["candidates"].get) == chosen
        assert entry.facts["predicted_speedup"] >= MARGIN
        assert entry.facts["saved_bytes"] == entry.facts["dense_bytes"] - entry.facts["sparse_bytes"]
    expected = model(x).detach()
    error = float((after(x) - expected).norm() / expected.norm())
    assert error < (1e-6 if preset == "sparse-float32" else 0.02)
    dense = PRESETS["float32" if preset == "sparse-float32" else "w8a8"]
    same = compiled(model, dense, x)[0](x)
    assert float((after(x) - same).norm() / same.norm()) < 1e-3
    assert after.weight_bytes < compiled(model, dense, x)[0].weight_bytes


@pytest.mark.parametrize("preset", ["sparse-float32", "sparse-int8"])
def test_an_artefact_runs_with_and_without_the_library(preset: str, tmp_path: Path) -> None:
    model, x = sparse_block(), random(1, 128, WIDTH)
    after, _ = compiled(model, PRESETS[preset], x)
    path = tmp_path / "model.onnx"
    export_onnx(after, path, "weights.bin")
    expected = model(x).detach().numpy()
    for library in (None, library_path()):
        found = open_session(path, library=library).run(None, {"x": x.numpy()})[0]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < (1e-5 if preset == "sparse-float32" else 0.02)


def test_the_report_lists_every_sparse_layer() -> None:
    made = isofold.compile(sparse_block(), (random(1, 128, WIDTH),), recipe="sparse-int8")
    rows = made.report["sparsity"]
    assert len(rows) == 4
    assert all(row["saved_bytes"] > 0.5 * row["dense_bytes"] for row in rows)
    assert [row["operator"] for row in made.report["layers"]] == ["linear_sparse"] * 6
    page = render_html(made.report)
    assert "Zeros that are skipped" in page
    assert page.count("unstructured") >= 4


def test_what_does_not_pay_stays_dense_and_says_how_far_it_is() -> None:
    matrix = random(64, 128)
    matrix[random(64, 128, seed=1) < -1] = 0  # 16 % zeros
    _, reports = compiled(only(nn.Linear, matrix), PRESETS["sparse-float32"], random(128, 128))
    report = reports["extract_sparsity"]
    assert not report.applied
    assert re.match(r"float32, unstructured: at a density of 8\d% and 128 rows", report.refused[0].reason)
    limit = break_even("16x1", "float32", 128, "float32")  # nearly all blocks of 16x1 hold something
    wanted = f"as 16x1 of float32, less than 1.1; it pays where up to {limit:.0%} of the weights are stored"
    assert wanted in report.refused[0].reason


def test_dense_layers_are_not_mentioned() -> None:
    _, reports = compiled(only(nn.Linear, random(32, 64)), PRESETS["sparse-int8"], random(3, 64))
    assert not reports["extract_sparsity"].applied
    assert not reports["extract_sparsity"].refused


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (WeightFormat(bits=2, group_size=32), "int2 in groups of 32 has no sparse kernel"),
        (WeightFormat(bits=8, symmetric=False), "zero points"),
    ],
)
def test_formats_without_a_sparse_kernel_are_refused(weights: WeightFormat, reason: str) -> None:
    matrix = random(64, 128)
    matrix[random(64, 128, seed=1) < 0.8] = 0
    recipe = PRESETS["sparse-int8"].model_copy(update={"weights": weights})
    _, reports = compiled(only(nn.Linear, matrix), recipe, random(3, 128))
    refused = [entry.reason for entry in reports["extract_sparsity"].refused]
    if weights.symmetric:
        assert any(reason in text for text in refused)
    else:
        # A zero weight has no zero code there, so that only the absence of a change shows.
        assert not reports["extract_sparsity"].applied


def test_a_rule_keeps_a_layer_dense(counts: Callable[[Program], dict[str, int]]) -> None:
    rule = LayerRule(match="down", sparsity=Sparsity(mode="off"))
    recipe = PRESETS["sparse-float32"].model_copy(update={"layers": [rule]})
    after, _ = compiled(sparse_block(), recipe, random(1, 128, WIDTH))
    assert counts(after)["linear"] == 1
    assert counts(after)["linear_sparse_float"] == 5


def test_pruning_reaches_the_density_and_changes_nothing_that_is_already_sparse() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), random(1, 128, WIDTH)
    _, reports = compiled(model, PRESETS["sparse80-int8"], x)
    pruned = reports["prune_weights"].applied
    assert len(pruned) == 6
    assert all(abs(entry.facts["density"] - 0.2) < 1e-3 for entry in pruned)
    assert all(0.3 < entry.facts["weight_error"] < 0.8 for entry in pruned)
    stored = reports["extract_sparsity"].applied
    # Small weights round to 0 beside the pruned ones.
    assert all(0.15 < entry.facts["density"] <= 0.2005 for entry in stored)
    _, again = compiled(sparse_block(0.15), PRESETS["sparse80-int8"], x)
    assert not again["prune_weights"].applied
    assert all("already is as sparse" in entry.reason for entry in again["prune_weights"].refused)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
@pytest.mark.parametrize("k", [64, 67])
def test_pruning_by_groups_keeps_the_largest(pattern: str, k: int) -> None:
    some, of = map(int, pattern.split(":"))
    weight = random(7, k)
    keep = kept(weight, Prune(pattern=pattern))  # type: ignore[arg-type] # one of its literals
    for start in range(0, k, of):
        part, there = weight[:, start : start + of].abs(), keep[:, start : start + of]
        assert (there.sum(1) == min(some, part.shape[1])).all()
        for row in range(7):
            if not bool(there[row].all()):
                assert part[row][there[row]].min() >= part[row][~there[row]].max()
    assert pattern_of(weight * keep).name == pattern


def test_pruning_keeps_the_largest_of_a_layer() -> None:
    weight = random(30, 41)
    keep = kept(weight, Prune(density=0.3))
    assert int(keep.sum()) == 369
    assert weight[keep].abs().min() >= weight[~keep].abs().max()
    assert kept(torch.ones(10, 10), Prune(density=0.3)).flatten().nonzero().flatten().tolist() == list(
        range(30)
    )


def test_a_tied_embedding_is_not_pruned() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    program = capture(Tied().eval(), (torch.tensor([[1, 2, 3]]),), None, None)
    recipe = Recipe(prune=Prune(density=0.2))
    _, reports = run_steps(program, plan(program, recipe))
    pruned = next(report for report in reports if report.name == "prune_weights")
    assert not pruned.applied
    assert "also read by aten.embedding" in pruned.refused[0].reason


def pattern_cases() -> dict[str, Tensor]:
    ones = torch.ones(64, 96)
    scattered = (random(64, 96) > 0.8) * ones
    rows = ones.clone()
    rows[::2] = 0
    rows[:, 10:60] = 0
    cases = {"dense": ones, "empty": 0 * ones, "unstructured": scattered, "rows and columns": rows}
    for height, width in ((4, 4), (1, 16), (16, 1), (16, 16)):
        grid = random(64 // height, 96 // width, seed=3) > 0.7
        cases[f"blocks of {height}x{width}"] = ones * grid.repeat_interleave(height, 0).repeat_interleave(
            width, 1
        )
    return cases


@pytest.mark.parametrize("name", pattern_cases())
def test_patterns_are_named(name: str) -> None:
    matrix = pattern_cases()[name]
    found = pattern_of(matrix)
    assert found.name == name
    assert found.density == pytest.approx(float((matrix != 0).float().mean()))
    assert found.empty_rows == int((matrix == 0).all(1).sum())
    assert found.empty_columns == int((matrix == 0).all(0).sum())


WEIGHTS = 1 << 20
SIZES = {"float32": 4.0, "bfloat16": 4.0, "int8": 1.0, "int4": 0.5}
FORMS = pytest.mark.parametrize(("layout", "value"), WIDE.paces)


@FORMS
@pytest.mark.parametrize("rows", [1, 2, 64, 128, 512])
def test_the_break_even_is_where_the_model_says_so(layout: str, value: str, rows: int) -> None:
    dense = "float32" if value == "bfloat16" else value
    whole = dense_time(dense, rows, WEIGHTS, int(SIZES[value] * WEIGHTS))

    def speedup(share: float) -> float:
        stored = int(WEIGHTS * share)
        return whole / sparse_time(
            layout, value, rows, WEIGHTS, stored, size_of(layout, value, WEIGHTS, stored)
        )

    limit = break_even(layout, value, rows, dense)
    if limit:
        assert speedup(limit) >= MARGIN * 0.999
    if limit < 1:
        assert speedup(limit + 0.011) < MARGIN
    gains = [speedup(d / 20) for d in range(1, 21)]
    assert gains == sorted(gains, reverse=True)


def test_the_model_knows_every_layout() -> None:
    assert set(WIDE.paces) == {(layout, value) for layout, values in HELD.items() for value in values}
    assert set(WIDE.dense) == {"float32", "int8", "int4"}


def patterned(layout: str, density: float, n: int = 256, k: int = 512) -> Tensor:
    """Non-zeros in the pattern of a layout."""
    matrix = random(n, k)
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        order = torch.rand(n, k // of, of, generator=torch.Generator().manual_seed(1)).argsort(-1)
        return matrix * (order < some).flatten(1)
    height, width = map(int, layout.split("x")) if "x" in layout else (1, 1)
    blocks = torch.rand(n // height, k // width, generator=torch.Generator().manual_seed(1)) < density
    return matrix * blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)


def codes(matrix: Tensor) -> Tensor:
    """int8 with the same zeros."""
    made = (matrix * 40).round().clamp(-127, 127).to(torch.int8)
    return made + ((made == 0) & (matrix != 0)).to(torch.int8)


@pytest.mark.parametrize(
    ("layout", "density", "value", "rows", "chosen"),
    [
        ("unstructured", 0.5, "int8", 1, "bitmask"),
        ("unstructured", 0.05, "int8", 1, "windows"),
        ("16x4", 0.3, "int8", 1, "16x4"),
        ("16x4", 0.3, "int8", 128, "16x4"),
        ("1x4", 0.2, "int8", 128, "1x4"),
        ("16x1", 0.3, "float32", 128, "16x1"),
        ("unstructured", 0.2, "float32", 1, "bitmask"),
        ("1:4", 1.0, "int8", 1, "1:4"),
        ("2:4", 1.0, "int8", 1, "bitmask"),
    ],
)
def test_the_layout_that_is_fastest_is_first(
    layout: str, density: float, value: str, rows: int, chosen: str
) -> None:
    matrix = patterned(layout, density)
    found = candidates(codes(matrix) if value == "int8" else matrix, value, rows)
    assert found[0].layout == chosen
    assert all(a.nanoseconds <= b.nanoseconds for a, b in pairwise(found))
    assert {c.layout for c in found} >= {"bitmask"}


def test_two_of_four_does_not_pay_with_many_rows_and_says_so() -> None:
    recipe = PRESETS["sparse-int8"]
    _, reports = compiled(only(nn.Linear, patterned("2:4", 1.0)), recipe, random(128, 512))
    report = reports["extract_sparsity"]
    assert not report.applied
    assert re.match(
        r"int8, 2:4: at a density of (50|49)% and 128 rows of activations", report.refused[0].reason
    )
    assert "times the dense speed as" in report.refused[0].reason


def test_values_that_are_bfloat16_are_stored_as_such() -> None:
    matrix = patterned("unstructured", 0.3)
    assert candidates(matrix, "float32", 1)[0].value == "float32"
    short = matrix.bfloat16().float()
    assert candidates(short, "float32", 1)[0].value == "bfloat16"
    x = random(1, 512)
    after, reports = compiled(only(nn.Linear, short), PRESETS["sparse-float32"], x)
    facts = reports["extract_sparsity"].applied[0].facts
    assert facts["values"] == "bfloat16"
    assert facts["sparse_bytes"] < 0.2 * facts["dense_bytes"]
    layer = only(nn.Linear, short)[0]  # type: ignore[index]
    assert torch.allclose(after(x) - after(0 * x), x @ layer.weight.T, atol=1e-4)


def test_sparse_int4_keeps_codes_and_scales() -> None:
    matrix, x = patterned("unstructured", 0.3), random(1, 512)
    model = only(nn.Linear, matrix)
    recipe = PRESETS["sparse-int4"].model_copy(update={"sparsity": Sparsity(gain=0.5)})
    after, reports = compiled(model, recipe, x)
    facts = reports["extract_sparsity"].applied[0].facts
    assert (facts["layout"], facts["values"]) == ("panels", "int4")
    dense, _ = compiled(model, PRESETS["w4a8"], x)
    assert torch.allclose(after(x), dense(x), atol=1e-5)


def test_a_layout_can_be_asked_for(counts: Callable[[Program], dict[str, int]]) -> None:
    recipe = PRESETS["sparse-int8"].model_copy(update={"sparsity": Sparsity(layout="16x4", gain=0.01)})
    after, reports = compiled(only(nn.Linear, patterned("16x4", 0.3)), recipe, random(1, 512))
    assert reports["extract_sparsity"].applied[0].facts["layout"] == "16x4"
    assert counts(after)["linear_sparse"] == 1
    wrong = recipe.model_copy(update={"sparsity": Sparsity(layout="2:4")})
    _, reports = compiled(only(nn.Linear, patterned("unstructured", 0.4)), wrong, random(1, 512))
    assert "the layout 2:4 does not hold it" in reports["extract_sparsity"].refused[0].reason


class Pointwise(nn.Module):
    """A convolution with a kernel of one between two others."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Conv2d(256, 512, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.inner(x))


def pruned(model: Pointwise, density: float) -> Pointwise:
    with torch.no_grad():
        model.inner.weight *= torch.rand(model.inner.weight.shape) < density
    return model.eval()


def test_a_pointwise_convolution_skips_zeros(
    counts: Callable[[Program], dict[str, int]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = pruned(Pointwise(), 0.1), random(2, 256, 14, 14)
    after, reports = compiled(model, PRESETS["sparse-float32"], x)
    assert counts(after)["linear_sparse_float"] == 1
    assert not counts(after)["conv2d"]
    assert torch.allclose(after(x), model(x), atol=1e-4)
    assert reports["expose_pointwise"].applied
    path = tmp_path / "model.onnx"
    export_onnx(after, path, "weights.bin")
    for library in (None, library_path()):
        found = open_session(path, library=library).run(None, {"x": x.numpy()})[0]
        assert np.allclose(found, model(x).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("density", "options", "reason"),
    [
        (0.8, {}, "pointwise, 20% zeros, 196 positions"),
        (0.1, {"stride": 2}, "kernel of 1, stride 1"),
        (0.1, {"groups": 4}, "kernel of 1, stride 1"),
    ],
)
def test_other_convolutions_stay(density: float, options: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    model, x = pruned(Pointwise(**options), density), random(1, 256, 14, 14)
    _, reports = compiled(model, PRESETS["sparse-float32"], x)
    assert not reports["expose_pointwise"].applied
    assert reason in reports["expose_pointwise"].refused[0].reason


def test_recipes_of_sparsity() -> None:
    recipe = Recipe.from_yaml(
        "sparsity: {gain: 1.5}\nprune: {pattern: '2:4'}\nlayers: [{match: '*.head', sparsity: {mode: off}}]"
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.format_for("a.head", "sparsity").mode == "off"
    assert recipe.format_for("a.b", "sparsity").gain == 1.5
    wrong: list[dict[str, Any]] = [{}, {"pattern": "2:4", "density": 0.5}, {"density": 0}, {"pattern": "3:4"}]
    for prune in wrong:
        with pytest.raises(RecipeError):
            resolve({"prune": prune})
