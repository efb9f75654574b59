"""Formats chosen by predicted time under a bound on the error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import isofold
from isofold.compiler.cost_model import Machine, kind_of
from isofold.compiler.errors import InputError, RecipeError
from isofold.compiler.frontend import prepare
from isofold.compiler.recipe import PRESETS, Recipe
from isofold.passes import choose_formats as module
from isofold.passes import pipeline
from isofold.passes.choose_formats import CODES, INTEGERS, OUTLIERS, _kind

AUTO: dict[str, Any] = {"format": "auto", "max_error": 0.1}


def model() -> nn.Module:
    """Two linears: the second one's weights are heavy-tailed, and round badly."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    with torch.no_grad():
        layers[2].weight.copy_(torch.randn(256, 256) ** 5)
    return layers


def machine(**paces: float) -> Machine:
    """Paces by kind, spaces written as underscores; memory costs a nanosecond a byte."""
    curves = {kind.replace("__", " "): [(1.0, pace)] for kind, pace in paces.items()}
    return Machine("made up", 1, 0.0, [(1.0, 1e9)], curves)


KINDS = {
    "linear_packed__8__bits": 1e-12,
    "linear_packed__4__bits__in__groups": 1e-12,
    "linear_packed__3__bits__in__groups": 1e-12,
    "linear_packed__2__bits__in__groups": 1e-12,
}


def chosen(monkeypatch: pytest.MonkeyPatch, rates: Machine, recipe: dict[str, Any]) -> dict[str, str]:
    monkeypatch.setattr(pipeline, "known_machine", lambda: (rates, True))
    done = prepare(model(), (torch.randn(2, 256),), recipe=recipe)
    records = [report.to_json() for report in done.passes if report.name == "choose_formats"]
    return {entry["module"]: entry["chosen"] for record in records for entry in record["applied"]}


def test_kinds_are_those_of_the_compiled_programs() -> None:
    for form in (*INTEGERS, OUTLIERS, *CODES):
        for integer in (True, False) if form.format == "int" else (False,):
            recipe = {
                "weights": form.model_dump(),
                "activations": {"mode": "dynamic" if integer else "float"},
            }
            program = prepare(nn.Linear(256, 64, bias=False), (torch.randn(2, 256),), recipe=recipe).program
            (kind,) = [k for node in program.graph.nodes if (k := kind_of(node)) is not None]
            assert kind == _kind(form, integer)


def test_where_memory_is_the_limit_the_smallest_format_within_the_error_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = {"weights": AUTO, "activations": {"mode": "dynamic"}}
    first = chosen(monkeypatch, machine(**KINDS), recipe)
    assert first["0"] == "int4, groups of 32"
    loose = chosen(monkeypatch, machine(**KINDS), {**recipe, "weights": {**AUTO, "max_error": 0.9}})
    assert loose["0"] == "int2, groups of 32"
    tight = chosen(monkeypatch, machine(**KINDS), {**recipe, "weights": {**AUTO, "max_error": 0.02}})
    assert tight["0"] == "int8, one scale a row"


def test_a_format_that_is_slow_here_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = machine(**{**KINDS, "linear_packed__4__bits__in__groups": 1e-7})
    recipe = {"weights": AUTO, "activations": {"mode": "dynamic"}}
    assert chosen(monkeypatch, slow, recipe)["0"] == "int8, one scale a row"


def test_layers_that_round_badly_keep_more_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"weights": {**AUTO, "max_error": 0.065}, "activations": {"mode": "dynamic"}}
    found = chosen(monkeypatch, machine(**KINDS), recipe)  # int4 leaves 0.060 and 0.073
    assert found == {"0": "int4, groups of 32", "2": "int4, groups of 128, 1% outliers"}
    monkeypatch.setattr(module, "OUTLIERS", INTEGERS[1])
    found = chosen(monkeypatch, machine(**KINDS), recipe)
    assert found == {"0": "int4, groups of 32", "2": "int8, one scale a row"}


def test_an_error_that_nothing_keeps_takes_the_most_precise_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "known_machine", lambda: (machine(**KINDS), True))
    recipe = {"weights": {**AUTO, "max_error": 1e-6}, "activations": {"mode": "dynamic"}}
    done = prepare(model(), (torch.randn(2, 256),), recipe=recipe)
    (record,) = [report.to_json() for report in done.passes if report.name == "choose_formats"]
    assert [entry["chosen"] for entry in record["applied"]] == ["int8, one scale a row"] * 2
    assert all("over the 1e-06 allowed" in entry["what"] for entry in record["applied"])


def test_rules_of_the_user_keep_their_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "weights": AUTO,
        "activations": {"mode": "dynamic"},
        "layers": [{"match": "2", "weights": {"bits": 4, "group_size": 64}}],
    }
    assert set(chosen(monkeypatch, machine(**KINDS), recipe)) == {"0"}
    only = {"layers": [{"match": "2", "weights": AUTO}], "activations": {"mode": "dynamic"}}
    assert set(chosen(monkeypatch, machine(**KINDS), only)) == {"2"}


def test_the_preset_compiles_with_the_rates_at_hand_and_runs() -> None:
    x = torch.randn(3, 256)
    for name in ("auto-a8", "auto-a16"):
        assert name in PRESETS
        compiled = isofold.compile(model(), (x,), recipe=name, measure=False)
        wanted = model()(x).detach()
        assert float((torch.as_tensor(compiled(x)) - wanted).norm() / wanted.norm()) < 0.2


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="format auto has no bits"):
        Recipe.from_yaml("weights: {format: auto, bits: 4}")
    with pytest.raises(RecipeError, match="format int has no max_error"):
        Recipe.from_yaml("weights: {bits: 4, max_error: 0.1}")
    broken = model()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(InputError, match="NaN"):
        prepare(broken, (torch.randn(2, 256),), recipe={"weights": AUTO})


def test_a_module_path_with_a_globs_characters_is_meant_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.glob.escape("layers[0].*") == "layers[[]0].[*]"


@pytest.mark.usefixtures("wide_rates")
def test_zeros_make_integers_faster_where_the_recipe_skips_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024).eval()
    with torch.no_grad():
        layer.weight *= torch.rand(1024, 1024) < 0.1
    rates = machine(**{**KINDS, "linear_packed__4__bits__in__groups": 3e-9, "linear_packed__8__bits": 1e-8})
    monkeypatch.setattr(pipeline, "known_machine", lambda: (rates, True))
    names = []
    for more in ({}, {"sparsity": {}}, {"sparsity": {"mode": "off"}}):
        recipe = {"weights": {**AUTO, "max_error": 0.2}, "activations": {"mode": "dynamic"}, **more}
        done = prepare(layer, (torch.randn(1, 1024),), recipe=recipe, verify=False)
        (report,) = [r for r in done.passes if r.name == "choose_formats"]
        times = {c["format"]: c["predicted_microseconds"] for c in report.applied[0].facts["candidates"]}
        names.append((times["int8, one scale a row"], times["int2, groups of 32"]))
    assert names[1][0] < 0.5 * names[0][0]
    assert names[1][1] == names[0][1]  # no sparse kernel has int2
    assert names[2] == names[0]
