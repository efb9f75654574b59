"""Experts are quantized and packed like linears: values, bytes, globs, what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import run_steps
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, LayerRule, Recipe, WeightFormat
from isofold.passes.pipeline import plan

EXPERTS, HIDDEN, INNER = 3, 70, 45


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 8)
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 7)
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        inner = torch.bmm(self.first[ids], x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(self.second[ids], F.relu(inner).unsqueeze(-1)).squeeze(-1) + self.bias[ids]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(HIDDEN, EXPERTS), Experts()

    def forward(self, x: Tensor) -> Tensor:
        ids = self.router(x).topk(1, -1).indices.reshape(-1)
        return x + self.experts(x, ids)


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(Model().eval(), (torch.randn(8, HIDDEN),), None, ({0: torch.export.Dim("m", max=99)},))


def applied(reports: Any, name: str) -> list[Any]:
    return [entry for report in reports if report.name == name for entry in report.applied]


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a16", "w3a8", "w2a8", "w8a8-static", "gptq"])
def test_recipes(name: str, program: Program, counts: Callable[[Program], Counter[str]]) -> None:
    batches = [(torch.randn(8, HIDDEN),)]
    by_gptq = Recipe(weights=WeightFormat(bits=4, group_size=32, solver="gptq"))
    after, reports = run_steps(program, plan(program, PRESETS.get(name, by_gptq), calibration=batches))
    operator = "linear_grouped_packed_float" if name in ("w4a16", "gptq") else "linear_grouped_packed"
    assert counts(after)[operator] == 2
    entries = [e for e in applied(reports, "quantize_weights") if e.place.module == "experts"]
    assert len(entries) == 2
    packed = applied(reports, "pack_grouped_linears")
    assert [e.facts["bytes_after"] for e in packed] == [e.facts["bytes_after"] for e in entries]
    solver = "gptq" if name == "gptq" else "nearest"
    assert [e.facts["solver"] for e in entries] == [solver, solver]
    assert all(report.error <= 2e-5 for report in reports if report.name == "pack_grouped_linears")


def test_rounding_is_that_of_the_matrices_by_themselves() -> None:
    """Each expert's rows get the codes and scales that a linear with them would get."""
    from isofold.compiler.editor import Editor
    from isofold.passes.quantize_weights import quantize_weights
    from isofold.passes.ranges import quantize_matrix

    torch.manual_seed(0)
    model = Model().eval()
    captured = canonicalize(capture(model, (torch.randn(8, HIDDEN),), None, None)).program
    editor = Editor(captured)
    quantize_weights.edit(editor, recipe=Recipe(weights=WeightFormat(bits=8)))
    done = editor.finish()
    codes = next(
        t for n, t in done.tensors.items() if n.startswith("experts.first") and t.dtype == torch.int8
    )
    for e in range(EXPERTS):
        own = quantize_matrix(
            model.experts.first[e], bits=8, group_size=0, symmetric=True, search="mse", storable=True
        )
        assert torch.equal(codes[e], own.codes)


def test_a_glob_keeps_experts_in_float(program: Program, counts: Callable[[Program], Counter[str]]) -> None:
    rule = LayerRule(match="experts", weights=None)
    recipe = PRESETS["w8a8"].model_copy(update={"layers": [rule]})
    after, _ = run_steps(program, plan(program, recipe))
    assert counts(after)["linear_grouped_dense"] == 2


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        ({"format": "nf4", "group_size": 32}, "nf4"),
        ({"format": "codebook"}, "codebook"),
        ({"bits": 4, "group_size": 32, "outliers": 0.01}, "outliers"),
        ({"bits": 4, "group_size": 32, "low_rank": 8}, "low_rank"),
    ],
)
def test_forms_that_experts_lack_are_refused(form: dict[str, Any], asked: str, program: Program) -> None:
    after, reports = run_steps(program, plan(program, Recipe(weights=WeightFormat(**form))))
    refused = {e.reason for r in reports for e in r.refused if e.place.module == "experts"}
    assert f"weights of grouped linears have no form with {asked} (int has)" in refused
    assert "linear_grouped_dense" in str(after.graph)


def test_float_experts_are_stored_in_panels(
    program: Program, counts: Callable[[Program], Counter[str]]
) -> None:
    after, _ = run_steps(program, plan(program, PRESETS["float32"]))
    assert counts(after)["linear_grouped_dense"] == 2
    torch.testing.assert_close(after(*program.example_args), program(*program.example_args))


@pytest.mark.parametrize(("largest", "chosen"), [(0.2, {2, 3, 4}), (0.02, {8})])
def test_auto_chooses_a_width_of_experts(largest: float, chosen: set[int], program: Program) -> None:
    recipe = Recipe(weights=WeightFormat(format="auto", max_error=largest))
    _, reports = run_steps(program, plan(program, recipe))
    (choice,) = (e for e in applied(reports, "choose_formats") if e.place.module == "experts")
    # Integers are all that experts have.
    assert [c["format"].split(",")[0][:3] for c in choice.facts["candidates"]] == ["int"] * 4
    packed = {e.facts["bits"] for e in applied(reports, "pack_grouped_linears")}
    assert len(packed) == 1
    assert packed <= chosen
