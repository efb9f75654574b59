"""Formats of a recipe: how weights, activations, embeddings, convolutions and caches are stored, and what is done to
zeros and bases before.

Each is a frozen pydantic model that checks its own fields; what must hold between two of them is checked by `Recipe`
(`recipe.py`). docs/recipes.md has a table of all fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

AutoOrOff = Annotated[
    Literal["auto", "off"], BeforeValidator(lambda given: "off" if given is False else given)
]
"""`off` may be written bare in YAML, which reads it as false."""


class Strict(BaseModel):
    """Refuses fields that it does not know, and cannot be changed."""

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
_CODEBOOK = ("codebooks", "code_bits")
_FOUND = ("bits", "group_size", "symmetric", "range", "solver", "low_rank", *_CODEBOOK, *_OUTLIERS)
_FOREIGN: dict[str, tuple[str, ...]] = {
    "int": (*_CODEBOOK, "max_error"),
    "codebook": ("bits", "group_size", "symmetric", "range", "solver", "max_error", *_OUTLIERS),
    "auto": _FOUND,
    "prequantized": (*_FOUND, "max_error"),
}
_FOREIGN_TO_CODES = ("bits", "symmetric", "solver", *_CODEBOOK, "max_error", *_OUTLIERS)
"""Fields of a weight's format that mean nothing in tables and small floats; `_FOREIGN`: in the others."""


class WeightFormat(Strict):
    """How a weight matrix is stored.

    format: `int` (integer codes), a table of 16 values (`nf4`, `table4`), small floats (`e4m3` ... `nvfp4`),
        `codebook` (sums of vectors of 8 weights), `auto` (see max_error), or `prequantized`: the codes that another
        tool has rounded the weight to, read off its values. Only `int`, `auto` and integers of `prequantized` meet
        integer activations; 8-bit floats meet FP8 activations; all meet float ones.
    bits: width of integer codes.
    group_size: inputs that share one scale; 0 is the whole row. Default: the format's own (`GROUP_SIZES`).
    symmetric: of integers: no zero points. With 2 and 3 bits zero points are multiples of 1/16 of a code.
    range: how a scale is found: `absmax`, from the largest magnitude, or `mse`, the least squared error over a grid.
    solver: of integers: `nearest`, or `gptq`, which needs calibration data.
    low_rank: rank of a float32 product A B beside the codes that makes up for their error; 0 for none.
    outliers: of integers: share of each row's weights, the farthest from its mean, kept as float16 beside the codes.
    outlier_sigma: of integers, instead: keep weights that many standard deviations from their row's mean.
    codebooks, code_bits: of `codebook`: how many vectors are summed, and the width of each one's index.
    max_error: of `auto`, which takes the format that the cost model predicts to be fastest on this machine among those
        whose rounding error is at most this share of the weight's Frobenius norm.
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
        return _FOREIGN.get(self.format, _FOREIGN_TO_CODES)

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


class ActivationFormat(Strict):
    """How the inputs of quantized layers are stored.

    mode: `float`; `dynamic`, a range for each token (for convolutions: each sample) found at run time; or `static`,
        one range a tensor, found on calibration data.
    format: `int`, unsigned codes with a zero point, or `e4m3`, FP8 with a scale alone, for linears whose weights are
        8-bit floats. Convolutions always read 8-bit integers.
    bits: width of integer codes that linears read.
    percentile: of static ranges: percentage of the values that the range covers.
    range: of static ranges, within that: `minmax`, all of it, or `mse`, the least squared error (each token relative
        to its own power).
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


class _TableFormat(Strict):
    """What embeddings and convolutions may be: integers, or the codes that another tool has rounded them to."""

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


class CacheFormat(Strict):
    """How keys and values of attentions are stored: unsigned codes with a scale and a zero point per token and head.

    storage: `rounded`: attentions read rounded values, while a cache that the model takes and returns stays float;
        `codes`: that cache becomes codes too, and the compiled model is called with them.
    group: of `codes`: dimensions of a head that share a scale and a zero point; 0 for all of them.
    """

    bits: Literal[4, 8] = 8
    storage: Literal["rounded", "codes"] = "rounded"
    group: Literal[0, 32, 64, 128] = 0

    @model_validator(mode="after")
    def _groups_are_stored(self) -> CacheFormat:
        if self.group and self.storage != "codes":
            raise ValueError("group is of caches that are stored: storage must be codes")
        return self


class Sparsity(Strict):
    """Whether linears skip the zeros of their weights.

    mode: `auto`, where that is predicted to be at least `gain` times as fast as the dense linear; `off`, nowhere.
    layout: how non-zeros are stored (docs/dialect.md): `auto`, the layout that is predicted to be fastest; `mixture`,
        blocks in one layout and the rest in another; or one layout by its name.
    """

    mode: AutoOrOff = "auto"
    gain: float = Field(default=1.1, gt=0.0)
    layout: Literal[
        "auto", "mixture", "bitmask", "panels", "windows", "1:4", "2:4", "4:8", "1x4", "16x1", "16x4"
    ] = "auto"


class Prune(Strict):
    """Which weights become zero (a pattern), or which channels and heads are removed (a structure).

    pattern: `unstructured`: of each linear's weights the share `density` stays, the largest by magnitude; N:M: the
        largest N of every M inputs stay.
    structure: instead of a pattern, remove the share `fraction` of the hidden channels, of the heads of attentions, or
        of the channels of the residual stream (`stream`).
    criterion: of a structure: remove what has the smallest weights (`magnitude`), or what contributes least on
        calibration data (`activation`).
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


class Fold(Strict):
    """Equivalent transforms that are folded into the weights before anything is rounded.

    rotation: of every channel space whose group allows one: `hadamard` (random signs, then a Hadamard matrix), `womi`
        (eigenvectors of the readers' weights, then Hadamard), `learned` (from Hadamard, on calibration data).
    scale: per channel of every quantized layer's input: `smoothquant`, `osplus`, `awq`, `cle`, `learned`, or `search`
        (the best of the first four for each layer). Folded into the writers where the equations allow it, else applied
        by the activation quantizer.
    shift: per channel, likewise: `osplus`, `mean`, `learned`, or `search` (the better of the first two).
    online: `auto` places Hadamard transforms in the graph in front of quantized inputs that no rotation reaches, and on
        queries and keys of a quantized cache; `off` places none. Nothing is placed without a rotation.
    balance: first choose the free scales that make the weights' norms least.
    steps: of learning; 0 stops at the closed-form start. seed: of random matrices and of the order of batches.
    """

    rotation: Literal["none", "hadamard", "womi", "learned"] = "none"
    scale: Literal["none", "smoothquant", "osplus", "awq", "cle", "search", "learned"] = "none"
    shift: Literal["none", "osplus", "mean", "search", "learned"] = "none"
    online: AutoOrOff = "auto"
    balance: bool = True
    steps: int = Field(default=100, ge=0)
    seed: int = 0

    @property
    def learns(self) -> bool:
        """Whether something is learned."""
        return "learned" in (self.rotation, self.scale, self.shift)

    @property
    def needs_data(self) -> bool:
        """Whether some choice is made on calibration data."""
        return self.learns or self.scale not in ("none", "cle") or self.shift != "none"
