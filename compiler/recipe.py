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
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from .errors import RecipeError, near_misses


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


GROUP_SIZES: dict[str, tuple[int, ...]] = {
    "nf4": (64, 32, 128),
    "table4": (64, 32, 128),
    "e4m3": (0, 32, 64, 128),
    "e5m2": (0, 32, 64, 128),
    "mxfp4": (32,),
    "mxfp6_e3m2": (32,),
    "mxfp6_e2m3": (32,),
    "mxfp8_e4m3": (32,),
    "mxfp8_e5m2": (32,),
    "nvfp4": (16,),
}
"""Sizes of the groups that each format of codes has, the default first (`dialect.element_formats.FORMATS`)."""


FP8_WEIGHTS = ("e4m3", "e5m2", "mxfp8_e4m3", "mxfp8_e5m2")
"""Formats of weights that FP8 activations meet (`dialect.linear_fp8.WEIGHT_FORMATS`)."""

_OUTLIERS = ("outliers", "outlier_sigma")


class WeightFormat(_Strict):
    """How a weight matrix is stored.

    format: `int`; codes of a table or of small floats (nf4, table4, e4m3, e5m2, mxfp4, mxfp6_e3m2, mxfp6_e2m3,
    mxfp8_e4m3, mxfp8_e5m2, nvfp4); `codebook`, sums of vectors of 8 weights; `auto`; or `prequantized`, the codes that
    another tool has rounded the weight to, read off its values. All but `int`, `auto` and `prequantized` meet
    float activations, 8-bit floats also activations of `e4m3`. bits, symmetric: of `int`: width, and no zero points
    (at 2 and 3 bits they are in sixteenths of a code, and worth their byte a group). group_size: inputs that share a
    scale (0: the whole row, not at 2 and 3 bits; without it the format's own). range: how the scale is found, `absmax`
    (largest magnitude; what the MX specification says) or `mse` (least squared error over a grid). solver: of `int`:
    codes by rounding each weight to the nearest, or by GPTQ, which needs calibration data. low_rank: rank of a thin
    part that stays float and makes up for the error of rounding (0: none). outliers, outlier_sigma: of `int`: the share
    of each row's weights, or all that lie so many standard deviations from its mean, that are kept as float16 beside
    the codes. codebooks, code_bits: of `codebook`: how many vectors are summed, and the width of the code that chooses
    each. max_error: of `auto`, which takes the format that the cost model says is fastest here among those whose
    rounding moves the weight by at most that share of its norm.
    """

    format: Literal[
        "int",
        "nf4",
        "table4",
        "e4m3",
        "e5m2",
        "mxfp4",
        "mxfp6_e3m2",
        "mxfp6_e2m3",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "nvfp4",
        "codebook",
        "auto",
        "prequantized",
    ] = "int"
    bits: Literal[2, 3, 4, 8] = 8
    group_size: Literal[0, 16, 32, 64, 128] = 0
    symmetric: bool = True
    range: Literal["absmax", "mse"] = "mse"
    solver: Literal["nearest", "gptq"] = "nearest"
    low_rank: int = Field(default=0, ge=0, le=256)
    outliers: float = Field(default=0.0, ge=0.0, le=0.05)
    outlier_sigma: float | None = Field(default=None, ge=2.0, le=20.0)
    codebooks: int = Field(default=2, ge=1, le=8)
    code_bits: Literal[8, 16] = 8
    max_error: float = Field(default=0.1, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _usual_group(cls, given: Any) -> Any:
        if isinstance(given, dict) and "group_size" not in given:
            sizes = GROUP_SIZES.get(str(given.get("format")))
            return given if sizes is None else {**given, "group_size": sizes[0]}
        return given

    @property
    def foreign_fields(self) -> tuple[str, ...]:
        """Fields that mean nothing in this format."""
        if self.format == "int":
            return ("codebooks", "code_bits", "max_error")
        if self.format == "codebook":
            return ("bits", "group_size", "symmetric", "range", "solver", "max_error", *_OUTLIERS)
        if self.format in ("auto", "prequantized"):
            foreign = (
                "bits",
                "group_size",
                "symmetric",
                "range",
                "solver",
                "low_rank",
                "codebooks",
                "code_bits",
                *_OUTLIERS,
            )
            return foreign if self.format == "auto" else (*foreign, "max_error")
        return ("bits", "symmetric", "solver", "codebooks", "code_bits", "max_error", *_OUTLIERS)

    @model_validator(mode="after")
    def _one_rule_of_outliers(self) -> WeightFormat:
        if self.outliers and self.outlier_sigma is not None:
            raise ValueError("outliers (a share of each row) and outlier_sigma are two rules; give one")
        if self.solver == "gptq" and (self.outliers or self.outlier_sigma is not None):
            raise ValueError(
                "solver: gptq moves every weight of a row; outliers keep some as they are; choose one"
            )
        return self

    @model_validator(mode="after")
    def _fields_of_the_format(self) -> WeightFormat:
        foreign = [name for name in self.foreign_fields if name in self.model_fields_set]
        if foreign:
            raise ValueError(f"format {self.format} has no {' and no '.join(foreign)}")
        if self.code_bits == 16 and self.codebooks > 2:
            raise ValueError("codebooks of 65536 vectors (code_bits 16) are at most 2")
        sizes = GROUP_SIZES.get(self.format, (0, 32, 64, 128))
        if self.group_size not in sizes:
            allowed = ", ".join(map(str, sorted(sizes)))
            raise ValueError(
                f"group_size of format {self.format} must be one of {allowed}, not {self.group_size}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_foreign_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        return {name: given for name, given in data.items() if name not in self.foreign_fields}

    @model_validator(mode="after")
    def _few_bits_need_groups(self) -> WeightFormat:
        if self.bits < 4 and self.group_size == 0:
            raise ValueError(
                f"weights of {self.bits} bits are stored in groups: group_size must be 32, 64 or 128"
            )
        return self


class ActivationFormat(_Strict):
    """How the inputs of quantized layers are stored.

    mode: `float` (not quantized), `dynamic` (per token, per sample for convolutions) or `static` (per tensor, needs
    calibration data). format: `int`, unsigned codes with a zero point, or `e4m3`, FP8 with a scale alone, for linears
    with weights of 8-bit floats. bits: of `int`: 8 or 4, for linears. Convolutions always read integers of 8 bits.
    percentile: for static ranges, the share of values kept inside (100: all). range: how static ranges are found within
    that, `minmax` (all of it) or `mse` (least squared error, each token relative to its own power).
    """

    mode: Literal["float", "dynamic", "static"] = "dynamic"
    format: Literal["int", "e4m3"] = "int"
    bits: Literal[4, 8] = 8
    percentile: float = Field(default=100.0, gt=50.0, le=100.0)
    range: Literal["minmax", "mse"] = "mse"

    @model_validator(mode="after")
    def _float_has_no_width(self) -> ActivationFormat:
        if self.mode == "float" and self.bits != 8:
            raise ValueError("bits is the width of quantized activations: mode must not be float")
        if self.mode == "float" and self.format != "int":
            raise ValueError(
                f"format {self.format} is of quantized activations: mode must be dynamic or static"
            )
        return self

    @model_validator(mode="after")
    def _small_floats_have_no_bits(self) -> ActivationFormat:
        if self.format != "int" and "bits" in self.model_fields_set:
            raise ValueError(f"format {self.format} has no bits")
        return self

    @model_serializer(mode="wrap")
    def _without_bits(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        return {name: given for name, given in data.items() if name != "bits" or self.format == "int"}


class _TableFormat(_Strict):
    """Formats that are integers, or what another tool has made of a weight."""

    format: Literal["int", "prequantized"] = "int"

    @model_validator(mode="after")
    def _found_formats_have_no_fields(self) -> Self:
        foreign = sorted(self.model_fields_set - {"format"})
        if self.format == "prequantized" and foreign:
            raise ValueError(f"format prequantized has no {' and no '.join(foreign)}")
        return self

    @model_serializer(mode="wrap")
    def _without_foreign_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        return {"format": self.format} if self.format == "prequantized" else data


class EmbeddingFormat(_TableFormat):
    """How embedding tables are stored: bits, group_size along the row (0: the whole row) and range as for weights.

    format: `int`, or `prequantized` as for weights, without the other fields.
    """

    bits: Literal[4, 8] = 8
    group_size: Literal[0, 32, 64, 128] = 0
    symmetric: bool = True
    range: Literal["absmax", "mse"] = "mse"


class ConvolutionFormat(_TableFormat):
    """How convolutions are stored: int8 per output channel, with int8 activations.

    format: `int`, or `prequantized` as for weights, without the other fields.
    """

    bits: Literal[8] = 8
    range: Literal["absmax", "mse"] = "mse"


class CacheFormat(_Strict):
    """How keys and values of attentions are stored: unsigned codes with a pair per token and head.

    storage: `rounded` where attentions read them (what a cache of codes computes), or `codes`: caches that are inputs
    and outputs of the model become codes, and the model is called with those. group: of `codes`: dimensions of a head
    that share a pair, 0: all of them.
    """

    bits: Literal[4, 8] = 8
    storage: Literal["rounded", "codes"] = "rounded"
    group: Literal[0, 32, 64, 128] = 0

    @model_validator(mode="after")
    def _groups_are_stored(self) -> CacheFormat:
        if self.group and self.storage != "codes":
            raise ValueError("group is of caches that are stored: storage must be codes")
        return self


class Sparsity(_Strict):
    """Whether linears skip the zeros of their weights.

    mode: `auto` where the model of `extract_sparsity` predicts at least `gain` times the dense speed, `off` never.
    layout: how what is not zero is stored: `auto`, the one that is predicted to be fastest, or always this one;
    `mixture` is blocks in one layout and what is beside them in another.
    """

    mode: Literal["auto", "off"] = "auto"
    gain: float = Field(default=1.1, gt=0.0)
    layout: Literal[
        "auto", "mixture", "bitmask", "panels", "windows", "1:4", "2:4", "4:8", "1x4", "16x1", "16x4"
    ] = "auto"

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        # YAML reads a bare off as false.
        return "off" if given is False else given


class Prune(_Strict):
    """Which weights of linears become zero: the smallest by magnitude; or which channels and heads go altogether.

    pattern: `unstructured` (the largest `density` of a layer's weights stay), or `1:4`, `2:4`, `4:8` (that many of
    every 4 or 8 inputs stay, and density is not given).
    structure: instead of a pattern, remove `fraction` of the hidden channels, of the heads of attentions, or of the
    channels of the residual stream (`stream`), the least important by `criterion`: `magnitude` of their weights, or
    `activation` (what they contribute on calibration data).
    """

    pattern: Literal["unstructured", "1:4", "2:4", "4:8"] = "unstructured"
    density: float | None = Field(default=None, gt=0.0, lt=1.0)
    structure: Literal["channels", "heads", "stream"] | None = None
    fraction: float | None = Field(default=None, gt=0.0, lt=1.0)
    criterion: Literal["magnitude", "activation"] = "magnitude"

    @model_validator(mode="after")
    def _one_of_both(self) -> Prune:
        if self.structure is not None:
            if self.fraction is None or self.density is not None or self.pattern != "unstructured":
                raise ValueError("a structure needs a fraction, and has neither density nor pattern")
            return self
        if self.fraction is not None or self.criterion != "magnitude":
            raise ValueError("fraction and criterion belong to a structure")
        if (self.density is None) == (self.pattern == "unstructured"):
            raise ValueError("an unstructured pattern needs a density, and an N:M pattern has its own")
        return self


class Fold(_Strict):
    """Equivalent transforms before anything is rounded; the program computes the same, and rounds better.

    rotation: of every channel space that takes one: `hadamard` (random signs and a Hadamard matrix), `womi`
    (eigenvectors of the readers' weights, then Hadamard), `learned` (from hadamard, on calibration data) or `none`.
    scale: of every quantized layer's input, per channel: `smoothquant`, `osplus`, `awq`, `cle`, `search` (the best
    of them at each layer), `learned`, `none`. It is folded into what writes the value where that is legal, and rides
    on the activation quantizer where not. shift: `osplus`, `mean`, `search`, `learned`, `none`, likewise.
    online: `auto` puts Hadamard transforms into the graph where inputs are quantized and no rotation can be folded,
    and on queries and keys where a cache is quantized; `off` never. Without a rotation there are none.
    balance: put free scales where the weights' norms are least, first. steps, seed: of learning and of random matrices.
    """

    rotation: Literal["none", "hadamard", "womi", "learned"] = "none"
    scale: Literal["none", "smoothquant", "osplus", "awq", "cle", "search", "learned"] = "none"
    shift: Literal["none", "osplus", "mean", "search", "learned"] = "none"
    online: Literal["auto", "off"] = "auto"
    balance: bool = True
    steps: int = Field(default=100, ge=0)
    seed: int = 0

    @field_validator("online", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        # YAML reads a bare off as false.
        return "off" if given is False else given

    @property
    def learns(self) -> bool:
        """Whether something is learned."""
        return "learned" in (self.rotation, self.scale, self.shift)

    @property
    def needs_data(self) -> bool:
        """Whether some choice is made on calibration data."""
        return self.learns or self.scale not in ("none", "cle") or self.shift != "none"


class LayerRule(_Strict):
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


class Recipe(_Strict):
    """A whole recipe. `None` for weights, embeddings, convolutions or kv (keys and values) leaves those in float.

    sparsity: whether linears skip the zeros of their weights, None: never. prune: which weights become zero.
    fold: equivalent transforms that come first, None for none.
    fuse: whether to fuse operators (attention, norms, epilogues, shared inputs) for the runtimes' kernels.
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
    layers: list[LayerRule] = []

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
    def _widths_need_readers(self) -> Recipe:
        forms = [self.activations, *(r.activations for r in self.layers if r.activations is not None)]
        if any(form.bits == 4 for form in forms) and not (
            self.weights is not None or any(rule.weights is not None for rule in self.layers)
        ):
            raise ValueError(
                "activations.bits: 4 is for inputs of quantized linears, but weights are float everywhere "
                "(convolutions read 8 bits)"
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

    @model_validator(mode="after")
    def _small_floats_need_readers(self) -> Recipe:
        weighted = self.weights is not None or any(rule.weights is not None for rule in self.layers)
        if any(form.format == "e4m3" for form in self.activation_formats) and not weighted:
            raise ValueError(
                "activations.format: e4m3 is for inputs of quantized linears, but weights are float everywhere "
                "(convolutions read integers of 8 bits)"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether some range or transform must be found on data."""
        if self.fold is not None and self.fold.needs_data:
            return True
        if any(form.criterion == "activation" for form in self.prune_formats):
            return True
        static = any(form.mode == "static" for form in self.activation_formats)
        return static or any(form.solver == "gptq" for form in self.weight_formats)

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
            raise RecipeError(
                "The recipe is not a mapping",
                where=where,
                expected="name: value lines",
                got=type(data).__name__,
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
    models = (
        Recipe,
        LayerRule,
        WeightFormat,
        ActivationFormat,
        EmbeddingFormat,
        ConvolutionFormat,
        CacheFormat,
        Sparsity,
        Prune,
        Fold,
    )
    return sorted({name for model in models for name in model.model_fields})
