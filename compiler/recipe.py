"""Recipes: what to do to which layers, as a typed object that reads from and writes to YAML.

    name: w4a8-head8
    weights: {bits: 4, group_size: 32, symmetric: true, range: mse}
    activations: {mode: dynamic}
    embeddings: {bits: 8}
    fold: {rotation: hadamard, scale: none}
    convolutions: {bits: 8}
    layers:
      - match: ["lm_head", "model.layers.0.*"]
        weights: {bits: 8, group_size: 0}
      - match: "*.router"
        weights: null            # keep in float

`match` is a glob (or several) over module paths; later rules win. A glob that matches no layer is an error.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import RecipeError, near_misses
from .formats import (
    FP8_WEIGHTS,
    GROUP_SIZES,
    ActivationFormat,
    CacheFormat,
    ConvolutionFormat,
    EmbeddingFormat,
    Fold,
    Prune,
    Sparsity,
    Strict,
    WeightFormat,
)

__all__ = [
    "FP8_WEIGHTS",
    "GROUP_SIZES",
    "PRESETS",
    "ActivationFormat",
    "CacheFormat",
    "ConvolutionFormat",
    "EmbeddingFormat",
    "Fold",
    "Kind",
    "LayerRule",
    "Prune",
    "Recipe",
    "Sparsity",
    "WeightFormat",
    "resolve",
]


class LayerRule(Strict):
    """Formats for the layers whose module path matches; what is not given is inherited, null means float."""

    match: str | list[str]
    weights: WeightFormat | None = None
    activations: ActivationFormat | None = None
    embeddings: EmbeddingFormat | None = None
    convolutions: ConvolutionFormat | None = None
    kv: CacheFormat | None = None
    sparsity: Sparsity | None = None
    prune: Prune | None = None

    @property
    def patterns(self) -> list[str]:
        """The globs as a list."""
        return [self.match] if isinstance(self.match, str) else self.match


class Recipe(Strict):
    """What is done to which layers.

    weights, activations, embeddings, convolutions: how these are stored; None keeps float.
    kv: how keys and values of attentions are stored; None keeps float.
    sparsity: whether linears skip the zeros of their weights; None: never.
    prune: which weights become zero or are removed; None: none.
    fold: equivalent transforms that come first; None: none.
    fuse: whether operators are fused (attention, norms, epilogues, shared inputs) for the runtimes' kernels.
    layers: exceptions for layers by module path; the last that matches wins.
    """

    name: str = "custom"
    weights: WeightFormat | None = None
    activations: ActivationFormat = ActivationFormat(mode="float")
    embeddings: EmbeddingFormat | None = None
    convolutions: ConvolutionFormat | None = None
    kv: CacheFormat | None = None
    sparsity: Sparsity | None = None
    prune: Prune | None = None
    fold: Fold | None = None
    fuse: bool = True
    layers: list[LayerRule] = Field(default_factory=list)

    @model_validator(mode="after")
    def _convolutions_need_activations(self) -> Recipe:
        form = self.convolutions
        if form is not None and form.format == "int" and self.activations.mode == "float":
            raise ValueError(
                "convolutions are quantized together with their inputs: activations.mode must not be float"
            )
        return self

    @model_validator(mode="after")
    def _folds_move_codes(self) -> Recipe:
        if self.is_prequantized and self.fold is not None:
            raise ValueError(
                "fold moves weights off the grid that format prequantized reads; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _narrow_activations_need_readers(self) -> Recipe:
        if self.weight_formats:
            return self
        if any(form.bits == 4 for form in self.activation_formats):
            raise ValueError(
                "activations.bits: 4 is for inputs of quantized linears, but weights are float everywhere "
                "(convolutions read 8 bits)"
            )
        if any(form.format == "e4m3" for form in self.activation_formats):
            raise ValueError(
                "activations.format: e4m3 is for inputs of quantized linears, but weights are float everywhere "
                "(convolutions read integers of 8 bits)"
            )
        return self

    @model_validator(mode="after")
    def _weights_meet_their_activations(self) -> Recipe:
        chosen = [("weights", self.weights, self.activations)]
        for i, rule in enumerate(self.layers):
            weights = rule.weights if "weights" in rule.model_fields_set else self.weights
            chosen.append((f"layers.{i}", weights, rule.activations or self.activations))
        floats, small_floats, integers = [], [], []
        for where, weights, activations in chosen:
            if weights is None or activations.mode == "float":
                continue
            found = f"{where}: {weights.format}"
            if activations.format == "e4m3" and weights.format not in FP8_WEIGHTS:
                integers.append(found)
            elif activations.format == "int" and weights.format in FP8_WEIGHTS:
                small_floats.append(found)
            elif activations.format == "int" and weights.format not in ("int", "auto", "prequantized"):
                floats.append(found)
        if floats:
            raise ValueError(
                "weights of these formats meet float activations, so activations.mode must be float "
                f"({'; '.join(floats)})"
            )
        if small_floats:
            raise ValueError(
                "weights of 8-bit floats meet float or FP8 activations, so activations.mode must be float, or "
                f"activations.format e4m3 ({'; '.join(small_floats)})"
            )
        if integers:
            raise ValueError(
                f"activations of e4m3 meet weights of {', '.join(FP8_WEIGHTS)} only; use one of these, or "
                f"activations.format int ({'; '.join(integers)})"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether something must be found on data."""
        return bool(self.calibrated)

    @property
    def calibrated(self) -> list[tuple[str, str]]:
        """What must be found on data, each with what could be used instead."""
        static = any(form.mode == "static" for form in self.activation_formats)
        by_activation = any(form.criterion == "activation" for form in self.prune_formats)
        gptq = any(form.solver == "gptq" for form in self.weight_formats)
        transforms = self.fold is not None and self.fold.needs_data
        asked = (
            (transforms, "transforms, which are chosen", "fold.scale: cle and fold.shift: none"),
            (static, "static activation ranges, which are measured", "activations.mode: dynamic"),
            (gptq, "weights.solver gptq, which rounds", "weights.solver: nearest"),
            (by_activation, "prune.criterion activation, which is measured", "prune.criterion: magnitude"),
        )
        return [(what, instead) for wanted, what, instead in asked if wanted]

    @property
    def activation_formats(self) -> list[ActivationFormat]:
        """The formats of activations that some layer may have."""
        return [self.activations, *(r.activations for r in self.layers if r.activations is not None)]

    @property
    def prune_formats(self) -> list[Prune]:
        """What some layer may be pruned by."""
        given = (self.prune, *(rule.prune for rule in self.layers))
        return [form for form in given if form is not None]

    @property
    def weight_formats(self) -> list[WeightFormat]:
        """The formats of weights that some layer may have."""
        given = (self.weights, *(rule.weights for rule in self.layers))
        return [form for form in given if form is not None]

    @property
    def is_prequantized(self) -> bool:
        """Whether some layer has the codes that another tool has rounded it to."""
        rules = (self, *self.layers)
        given = [getattr(rule, kind) for rule in rules for kind in ("weights", "embeddings", "convolutions")]
        return any(form is not None and form.format == "prequantized" for form in given)

    @property
    def cache_formats(self) -> list[CacheFormat]:
        """The formats of keys and values that some attention may have."""
        given = (self.kv, *(rule.kv for rule in self.layers))
        return [form for form in given if form is not None]

    @property
    def quantizes_activations(self) -> bool:
        """Whether the activations of some layer are quantized."""
        return any(form.mode != "float" for form in self.activation_formats)

    def asks_for(self, kind: Kind) -> bool:
        """Whether some layer of this kind has a format, and is not left float."""
        return getattr(self, kind) is not None or any(getattr(rule, kind) is not None for rule in self.layers)

    def format_for(self, path: str, kind: Kind) -> Any:
        """The format of `kind` for the layer at `path` after all rules, None where it stays float."""
        chosen = getattr(self, kind)
        for rule in self.layers:
            if kind in rule.model_fields_set and any(fnmatch.fnmatchcase(path, p) for p in rule.patterns):
                chosen = getattr(rule, kind)
        return chosen

    def check_matches(self, paths: Iterable[str]) -> None:
        """Raise RecipeError that lists every glob that matches none of the layers' paths, with near misses."""
        known = sorted(set(paths))
        lost = [p for rule in self.layers for p in rule.patterns if not fnmatch.filter(known, p)]
        if lost:
            hints = [hint for p in lost if (hint := near_misses(p, known))]
            raise RecipeError(
                "Layer patterns of the recipe match no layer: " + ", ".join(repr(p) for p in lost),
                where=f"recipe {self.name!r}, layers",
                expected=f"globs over the {len(known)} layers of the model, such as {', '.join(map(repr, known[:3]))}",
                hint="; ".join(hints) or "list the layers with: isofold inspect MODEL",
            )

    def to_yaml(self) -> str:
        """The recipe as YAML, without the fields that a rule leaves to be inherited."""
        data = self.model_dump(mode="json", exclude={"layers"})
        if self.layers:
            data["layers"] = [r.model_dump(mode="json", exclude_unset=True) for r in self.layers]
        return yaml.safe_dump(data, sort_keys=False)

    @staticmethod
    def from_yaml(text: str, where: str = "recipe") -> Recipe:
        """Parse YAML. Raises RecipeError that lists every problem with its field."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError("The recipe is not valid YAML", where=where, got=str(error)) from error
        if not isinstance(data, dict):
            got = type(data).__name__
            raise RecipeError(
                "The recipe is not a mapping", where=where, expected="name: value lines", got=got
            )
        return _validate(Recipe, data, where)


Kind = Literal["weights", "activations", "embeddings", "convolutions", "kv", "sparsity", "prune"]
_Model = TypeVar("_Model", bound=BaseModel)

_AUTO = WeightFormat(format="auto")
_W8 = WeightFormat(bits=8)
_W4 = WeightFormat(bits=4, group_size=32)
_W4_OUTLIERS = WeightFormat(bits=4, group_size=128, outliers=0.01)
_W3 = WeightFormat(bits=3, group_size=32, symmetric=False)
_W2 = WeightFormat(bits=2, group_size=32, symmetric=False)
_DYNAMIC = ActivationFormat(mode="dynamic")
_DYNAMIC4 = ActivationFormat(mode="dynamic", bits=4)
_FP8 = WeightFormat(format="e4m3")
_DYNAMIC_FP8 = ActivationFormat(mode="dynamic", format="e4m3")


def _preset(name: str, weights: WeightFormat, activations: ActivationFormat, **more: Any) -> Recipe:
    """A preset that quantizes activations, and with them everything else that can be quantized."""
    return Recipe(
        name=name,
        weights=weights,
        activations=activations,
        embeddings=EmbeddingFormat(),
        convolutions=ConvolutionFormat(),
        **more,
    )


def _prequantized(name: str, activations: ActivationFormat) -> Recipe:
    """A preset that keeps the codes that another tool has rounded weights to."""
    return Recipe(
        name=name,
        weights=WeightFormat(format="prequantized"),
        activations=activations,
        embeddings=EmbeddingFormat(format="prequantized"),
        convolutions=ConvolutionFormat(format="prequantized"),
    )


_KV4 = CacheFormat(bits=4)
_SMOOTH = Fold(scale="search", shift="mean")
_ROTATE = Fold(rotation="hadamard")
_SPARSE = Sparsity()
_PRUNE80 = Prune(density=0.2)
_PRUNE90 = Prune(density=0.1)
_LEARNED = Fold(rotation="learned", scale="learned", shift="learned", steps=0)

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="float32"),
        _preset("w8a8", _W8, _DYNAMIC),
        _preset("w8a8-static", _W8, ActivationFormat(mode="static")),
        _preset("w4a8", _W4, _DYNAMIC),
        _preset("w3a8", _W3, _DYNAMIC),
        _preset("w2a8", _W2, _DYNAMIC),
        _preset("w4a4", _W4, _DYNAMIC4),
        _preset("w4a4kv4", _W4, _DYNAMIC4, kv=_KV4),
        _preset("fp8", _FP8, _DYNAMIC_FP8),
        _preset("fp8-static", _FP8, ActivationFormat(mode="static", format="e4m3")),
        _preset("w8a8-smooth", _W8, _DYNAMIC, fold=_SMOOTH),
        _preset("w4a8-smooth", _W4, _DYNAMIC, fold=_SMOOTH),
        _preset("w4a8-rotate", _W4, _DYNAMIC, fold=_ROTATE),
        _preset("w4a4kv4-rotate", _W4, _DYNAMIC4, kv=_KV4, fold=_ROTATE),
        _preset("w4a4kv4-learned", _W4, _DYNAMIC4, kv=_KV4, fold=_LEARNED),
        Recipe(name="sparse-float32", sparsity=_SPARSE),
        Recipe(name="sparse80-float32", sparsity=_SPARSE, prune=_PRUNE80),
        Recipe(name="sparse90-float32", sparsity=_SPARSE, prune=_PRUNE90),
        _preset("sparse-int8", _W8, _DYNAMIC, sparsity=_SPARSE),
        _preset("sparse80-int8", _W8, _DYNAMIC, sparsity=_SPARSE, prune=_PRUNE80),
        _preset("sparse-int4", _W4, _DYNAMIC, sparsity=_SPARSE),
        Recipe(name="w8a16", weights=_W8, embeddings=EmbeddingFormat()),
        Recipe(name="w4a16", weights=_W4, embeddings=EmbeddingFormat()),
        Recipe(name="w4a16-outliers", weights=_W4_OUTLIERS, embeddings=EmbeddingFormat()),
        Recipe(name="w3a16", weights=_W3, embeddings=EmbeddingFormat()),
        Recipe(name="w2a16", weights=_W2, embeddings=EmbeddingFormat()),
        Recipe(name="w4-nf4", weights=WeightFormat(format="nf4"), embeddings=EmbeddingFormat()),
        Recipe(name="w8-fp8", weights=_FP8, embeddings=EmbeddingFormat()),
        Recipe(name="w4-mxfp4", weights=WeightFormat(format="mxfp4"), embeddings=EmbeddingFormat()),
        Recipe(name="w2-codebook", weights=WeightFormat(format="codebook"), embeddings=EmbeddingFormat()),
        _prequantized("prequantized", ActivationFormat(mode="float")),
        _prequantized("prequantized-a8", _DYNAMIC),
        _preset("auto-a8", _AUTO, _DYNAMIC),
        Recipe(name="auto-a16", weights=_AUTO, embeddings=EmbeddingFormat()),
    )
}
"""Named recipes. `w` is the width of weights, `a` that of activations (a16: float), `kv` that of keys and
values; `fp8` E4M3 for weights and activations, `w8-fp8` for weights alone; `smooth` (scales and shifts), `rotate` and
`learned` name the transforms that are folded in first; `prequantized` keeps what another tool has rounded weights and
activations to; `auto` chooses a width for each layer by the cost model."""


def resolve(recipe: Recipe | str | os.PathLike[str] | dict[str, Any]) -> Recipe:
    """A Recipe from a preset's name, the path of a YAML file, a mapping, or a Recipe. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, dict):
        return _validate(Recipe, recipe, "recipe")
    text = os.fspath(recipe)
    if text in PRESETS:
        return PRESETS[text]
    if Path(text).suffix in (".yaml", ".yml"):
        try:
            return Recipe.from_yaml(Path(text).read_text(), where=text)
        except OSError as error:
            raise RecipeError("The recipe file cannot be read", where=text, got=str(error)) from error
    raise RecipeError(
        f"Unknown recipe {text!r}",
        expected=f"one of {', '.join(PRESETS)}, or the path of a .yaml file",
        hint=near_misses(text, PRESETS),
    )


def _validate(model: type[_Model], data: dict[str, Any], where: str) -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = []
        for entry in error.errors():
            path = ".".join(str(p) for p in entry["loc"]) or "recipe"
            problem = f"{path}: {entry['msg']}, got {entry['input']!r}"
            if entry["type"] == "extra_forbidden":
                hint = near_misses(str(entry["loc"][-1]), _field_names())
                problem = f"{path}: no such field" + (f" ({hint})" if hint else "")
            problems.append(problem)
        raise RecipeError("The recipe is not valid", where=where, got="; ".join(problems)) from error


def _field_names() -> list[str]:
    formats = (
        WeightFormat,
        ActivationFormat,
        EmbeddingFormat,
        ConvolutionFormat,
        CacheFormat,
        Sparsity,
        Prune,
        Fold,
    )
    return sorted({name for model in (Recipe, LayerRule, *formats) for name in model.model_fields})
