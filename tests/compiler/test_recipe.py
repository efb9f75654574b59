"""Recipes: YAML and back, rules in order, and every problem named with its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isofold.compiler.dialect.element_formats import FORMATS
from isofold.compiler.errors import InputError, RecipeError
from isofold.compiler.frontend import prepare
from isofold.compiler.recipe import GROUP_SIZES, PRESETS, Fold, Recipe, resolve

TEXT = """
name: mixed
weights: {bits: 4, group_size: 32, range: absmax}
activations: {mode: static, percentile: 99.9}
embeddings: {bits: 8}
kv: {bits: 4}
layers:
  - match: ["lm_head", "model.layers.0.*"]
    weights: {bits: 8}
  - match: "*.router"
    weights: null
  - match: "model.layers.0.q"
    activations: {mode: dynamic, bits: 4}
  - match: "model.layers.0.attention"
    kv: null
"""


def test_rules_apply_in_order_and_null_means_float() -> None:
    recipe = Recipe.from_yaml(TEXT)
    assert recipe.format_for("model.layers.1.q", "weights").bits == 4
    assert recipe.format_for("model.layers.0.q", "weights").bits == 8
    assert recipe.format_for("model.layers.0.router", "weights") is None
    assert recipe.format_for("model.layers.0.router", "activations").mode == "static"
    assert recipe.format_for("model.layers.0.q", "activations").mode == "dynamic"
    assert recipe.format_for("model.layers.0.q", "activations").bits == 4
    assert recipe.format_for("model.layers.1.q", "activations").bits == 8
    assert recipe.format_for("model.layers.0.attention", "kv") is None
    assert recipe.format_for("model.layers.1.attention", "kv").bits == 4
    assert recipe.format_for("lm_head", "convolutions") is None
    assert recipe.needs_calibration


@pytest.mark.parametrize("recipe", [*PRESETS.values(), Recipe.from_yaml(TEXT)], ids=lambda r: r.name)
def test_yaml_round_trip(recipe: Recipe) -> None:
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    for path in ("lm_head", "x.router", "model.layers.0.q", "model.layers.0.attention"):
        for kind in ("weights", "activations", "embeddings", "convolutions", "kv"):
            assert again.format_for(path, kind) == recipe.format_for(path, kind)


def test_globs_that_match_nothing_are_listed_with_near_misses() -> None:
    recipe = Recipe(layers=[{"match": ["lm_hed", "*.q"]}, {"match": "nothing.like.it"}])
    recipe.check_matches(["lm_hed", "a.q", "nothing.like.it"])
    with pytest.raises(RecipeError) as caught:
        recipe.check_matches(["lm_head", "model.layers.0.q"])
    text = str(caught.value)
    assert "match no layer: 'lm_hed', 'nothing.like.it'" in text
    assert "did you mean 'lm_head'?" in text
    assert "globs over the 2 layers" in text


def test_resolve_takes_presets_files_mappings_and_recipes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT)
    assert resolve("w8a8") is PRESETS["w8a8"]
    assert resolve(PRESETS["w4a8"]) is PRESETS["w4a8"]
    assert resolve(tmp_path / "r.yaml").name == "mixed"
    assert resolve({"weights": {"bits": 4}}).weights is not None


BAD: list[tuple[Any, str]] = [
    ("w8a9", r"Unknown recipe 'w8a9'[\s\S]*did you mean 'w8a8'"),
    ("missing.yaml", r"cannot be read\n  where: missing.yaml"),
    ({"weights": {"bits": 5}}, r"weights.bits: .*got 5"),
    ({"wieghts": {"bits": 4}}, r"wieghts: no such field \(did you mean 'weights'"),
    (
        {"weights": {"group": 32}, "activations": {"mode": "int8"}},
        r"weights.group: no such field[\s\S]*activations.mode",
    ),
    ({"activations": {"mode": "static", "percentile": 20}}, r"activations.percentile"),
    ({"weights": {}, "activations": {"mode": "float", "bits": 4}}, r"activations: .*mode must not be float"),
    (
        {"convolutions": {}, "activations": {"bits": 4}},
        r"inputs of quantized linears, but weights are float everywhere",
    ),
    ({"weights": {"bits": 2}}, r"weights: .*2 bits are stored in groups: group_size must be 32, 64 or 128"),
    ({"embeddings": {"bits": 3}}, r"embeddings.bits: .*got 3"),
    ({"kv": {"bits": 2}}, r"kv.bits: .*got 2"),
    ({"kv": {"granularity": "tensor"}}, r"kv.granularity: no such field"),
    ({"convolutions": {}}, r"activations.mode must not be float"),
    ({"weights": {"format": "nf5"}}, r"weights.format: .*'nf4'.*got 'nf5'"),
    ({"weights": {"format": "nf4", "bits": 4}}, r"weights: .*format nf4 has no bits"),
    (
        {"weights": {"format": "mxfp4", "symmetric": False, "codebooks": 2}},
        r"format mxfp4 has no symmetric and no codebooks",
    ),
    (
        {"weights": {"format": "nvfp4", "group_size": 32}},
        r"group_size of format nvfp4 must be one of 16, not 32",
    ),
    (
        {"weights": {"bits": 4, "group_size": 16}},
        r"group_size of format int must be one of 0, 32, 64, 128, not 16",
    ),
    (
        {"weights": {"format": "nf4"}, "activations": {"mode": "dynamic"}},
        r"activations.mode must be float \(weights: nf4\)",
    ),
    (
        {
            "weights": {"bits": 8},
            "activations": {"mode": "dynamic"},
            "layers": [{"match": "x", "weights": {"format": "e4m3"}}],
        },
        r"activations.mode must be float, or activations.format e4m3 \(layers.0: e4m3\)",
    ),
    (
        {"weights": {"bits": 8}, "activations": {"format": "e4m3"}},
        r"activations of e4m3 meet weights of e4m3, .* only; use one of these, or activations.format int \(weights",
    ),
    (
        {
            "weights": {"format": "e4m3"},
            "activations": {"format": "e4m3"},
            "layers": [{"match": "x", "weights": {"format": "nf4"}}],
        },
        r"activations of e4m3 meet weights .* \(layers.0: nf4\)",
    ),
    ({"weights": {"format": "auto"}, "activations": {"format": "e4m3"}}, r"e4m3 meet .* \(weights: auto\)"),
    ({"weights": {"format": "e4m3"}, "activations": {"format": "e5m2"}}, r"activations.format: .*got 'e5m2'"),
    (
        {"weights": {"format": "e4m3"}, "activations": {"format": "e4m3", "bits": 8}},
        r"activations: .*format e4m3 has no bits",
    ),
    (
        {"weights": {"format": "e4m3"}, "activations": {"mode": "float", "format": "e4m3"}},
        r"format e4m3 is of quantized activations: mode must be dynamic or static",
    ),
    (
        {"convolutions": {}, "activations": {"format": "e4m3"}},
        r"activations.format: e4m3 is for inputs of quantized linears, but weights are float everywhere",
    ),
    ({"weights": {"bits": 4, "code_bits": 16}}, r"format int has no code_bits"),
    ({"weights": {"format": "codebook", "range": "mse"}}, r"format codebook has no range"),
    ({"weights": {"format": "codebook", "code_bits": 16, "codebooks": 3}}, r"are at most 2"),
    ({"fold": {"rotation": "qr"}}, r"fold.rotation: .*'hadamard'.*got 'qr'"),
    ({"fold": {"scale": "smooth", "shift": "os"}}, r"fold.scale: [\s\S]*fold.shift: .*got 'os'"),
    ({"fold": {"rotations": "womi"}}, r"fold.rotations: no such field \(did you mean 'rotation'"),
    ({"fold": {"steps": -1}}, r"fold.steps: .*got -1"),
    ({"fold": "hadamard"}, r"fold: .*got 'hadamard'"),
    ({"layers": [{"weights": None}]}, r"layers.0.match"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_problems_are_listed_with_their_field(given: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(given)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "not a mapping[\\s\\S]*got: list")]
)
def test_files_that_are_not_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        resolve(tmp_path / "r.yml")


def test_formats_of_codes_have_their_own_groups_and_are_written_without_foreign_fields() -> None:
    assert {name: form.group_sizes for name, form in FORMATS.items()} == GROUP_SIZES
    recipe = resolve(
        {"weights": {"format": "nf4"}, "layers": [{"match": "x", "weights": {"format": "e4m3"}}]}
    )
    assert recipe.weights is not None
    assert recipe.weights.group_size == 64
    assert recipe.format_for("x", "weights").group_size == 0
    text = recipe.to_yaml()
    assert "bits" not in text.split("layers")[0].split("activations")[0]
    assert Recipe.from_yaml(text) == recipe
    mixed = {"match": "x", "weights": {"format": "nf4"}, "activations": {"mode": "float"}}
    assert resolve({"weights": {"bits": 8}, "activations": {}, "layers": [mixed]}).needs_calibration is False


FOLD = """
name: turned
weights: {bits: 4, group_size: 32}
activations: {mode: dynamic, bits: 4}
fold: {rotation: womi, scale: cle, online: off, balance: false, seed: 3}
"""


def test_fold_is_read_and_written() -> None:
    recipe = Recipe.from_yaml(FOLD)
    assert recipe.fold == Fold(rotation="womi", scale="cle", online="off", balance=False, seed=3)
    assert recipe.fold is not None
    assert (recipe.fold.shift, recipe.fold.steps) == ("none", 100)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml("fold: null").fold is None


@pytest.mark.parametrize(
    ("fold", "learns", "data"),
    [
        ({"rotation": "hadamard"}, False, False),
        ({"rotation": "womi", "scale": "cle"}, False, False),
        ({"scale": "smoothquant"}, False, True),
        ({"scale": "search"}, False, True),
        ({"shift": "mean"}, False, True),
        ({"rotation": "learned"}, True, True),
        ({"scale": "learned"}, True, True),
    ],
)
def test_which_folds_need_data(fold: dict[str, Any], learns: bool, data: bool) -> None:
    recipe = Recipe(fold=Fold(**fold))
    assert recipe.fold is not None
    assert recipe.fold.learns == learns
    assert recipe.needs_calibration == data


def test_presets_that_fold() -> None:
    assert {name: recipe.needs_calibration for name, recipe in PRESETS.items() if recipe.fold} == {
        "w8a8-smooth": True,
        "w4a8-smooth": True,
        "w4a8-rotate": False,
        "w4a4kv4-rotate": False,
        "w4a4kv4-learned": True,
    }


def test_the_documentation_lists_every_preset_and_field_of_fold(root: Path) -> None:
    text = (root / "docs" / "recipes.md").read_text()
    for name in PRESETS:
        assert f"| `{name}` |" in text, name
    for field in Fold.model_fields:
        assert f"`fold.{field}`" in text, field


@pytest.mark.parametrize(
    ("recipe", "what", "instead"),
    [
        ({"weights": {"solver": "gptq"}}, "weights.solver gptq", "weights.solver: nearest"),
        (
            {"weights": {}, "activations": {"mode": "static"}},
            "static activation ranges",
            "activations.mode: dynamic",
        ),
        ({"fold": {"scale": "awq"}}, "transforms", "fold.scale: cle"),
        (
            {"prune": {"structure": "heads", "fraction": 0.5, "criterion": "activation"}},
            "prune.criterion activation",
            "prune.criterion: magnitude",
        ),
    ],
)
def test_without_data_the_error_names_what_needs_it(recipe: dict[str, Any], what: str, instead: str) -> None:
    with pytest.raises(InputError) as caught:
        prepare(torch.nn.Identity(), (torch.zeros(1),), recipe=recipe)
    assert what in caught.value.what
    assert instead in caught.value.hint
