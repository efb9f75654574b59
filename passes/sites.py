"""Sites: values that quantized layers read, where a scale and a shift per channel may be put.

    Q(x) W^T + b   →   Q((x - z) / s) (W s)^T + b + W z

is the same function without Q for every positive s and every z, so each site is a free choice of two vectors;
Q, the recipe's rounding of x and W, is what makes one choice better than another. All layers that read
one value in one activation format share the choice (q, k and v; gate and up), as they share its codes.

The weights of experts are read as one matrix, their rows one above the other: x W^T is then taken for each row by the
matrix that it chose, and a site's two vectors are those of all experts.

A site is found by edges and operators, never by names. Its own name is that of its first reader's node, which
passes keep, so that choices made on one program can be applied to a later form of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import linear_grouped
from ..compiler.editor import Editor
from ..compiler.errors import InputError
from ..compiler.graph import argument, dtype, static_size
from ..compiler.hadamard import apply_hadamard
from ..compiler.program import Program
from ..compiler.recipe import ActivationFormat, Kind, Recipe
from .layers import ROUNDERS, Layer, activation_format, check_finite, is_call_of, selected
from .ranges import QuantizedMatrix
from .rounded_weight import integer_codes, rounded_weight

KINDS: tuple[Kind, ...] = ("weights", "convolutions")


@dataclass(frozen=True)
class EdgeTransform:
    """What is done to a value on its way to its readers: `((x - shift) / scale) H`.

    scale, shift: float64 vectors `[K]` or None. hadamard: orders of the factors of H (`isofold::hadamard`), empty for
    none. Raises InputError where a scale is not positive or a number is not finite.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    hadamard: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, vector in (("scale", self.scale), ("shift", self.shift)):
            if vector is None:
                continue
            if (
                vector.dim() != 1
                or not torch.isfinite(vector).all()
                or (name == "scale" and vector.min() <= 0)
            ):
                raise InputError(
                    f"The {name} on an edge is not a vector of finite{' positive' * (name == 'scale')} numbers",
                    got=f"shape {list(vector.shape)}, least {float(vector.min()) if vector.numel() else None}",
                )

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        unscaled = self.scale is None or bool((self.scale == 1).all())
        unshifted = self.shift is None or not bool(self.shift.any())
        return unscaled and unshifted and not self.hadamard

    def apply(self, x: Tensor, dim: int = -1) -> Tensor:
        """x as its readers see it, channels along `dim` (the last one where there is a Hadamard transform)."""
        if self.shift is not None:
            x = x - along(self.shift.to(x), x, dim)
        if self.scale is not None:
            x = x / along(self.scale.to(x), x, dim)
        return apply_hadamard(x, self.hadamard) if self.hadamard else x

    def fold(self, weight: Tensor) -> Tensor:
        """The weight float `[N, K, ...]` that reads the transformed value, `W diag(s) H`, in float64."""
        folded = weight.double()
        if self.scale is not None:
            folded = folded * along(self.scale.double(), weight, 1)
        return apply_hadamard(folded, self.hadamard) if self.hadamard else folded

    def offset(self, weight: Tensor) -> Tensor | None:
        """W z, float64 `[N]`: what the shift takes from each output (kernel positions summed); None without one."""
        if self.shift is None:
            return None
        return (weight.double() * along(self.shift.double(), weight, 1)).flatten(1).sum(1)


@dataclass(frozen=True)
class Reader:
    """One layer of a site: its node's name, module path, weight float `[N, K, ...]` and the weight's format.

    run: `run(x, weight, ids)` is the layer without its bias, on its own weight or the same rows of every expert.
    pads: whether it puts zeros around x. experts: how many matrices the weight holds (`[E N, K]`), 0 for a plain layer.
    chooser: the name of the value that holds the expert of each row of x.
    """

    node: str
    path: str
    weight: Tensor
    format: Any
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    pads: bool
    experts: int = 0
    chooser: str | None = None

    def rounded(self, weight: Tensor) -> Tensor:
        """`weight`, some rows or a transform of the layer's own, as its format leaves it, float32."""
        return rounded_weight(weight, self.format, storable=self.weight.dim() == 2)

    def some(self, most: int, generator: torch.Generator) -> Tensor:
        """At most `most` rows of the weight, a random choice (of experts' the same rows of all, `most` of each)."""
        weight = self.weight.unflatten(0, (self.experts or 1, -1))
        if weight.shape[1] > most:
            chosen = torch.randperm(weight.shape[1], generator=generator)[:most].sort().values
            weight = weight[:, chosen]
        return weight.flatten(0, 1)

    def quantized(self, weight: Tensor) -> QuantizedMatrix:
        """The integer codes that `weight`, some rows or a transform of the layer's own, gets in its format."""
        return integer_codes(weight, self.format, storable=self.weight.dim() == 2)


@dataclass(frozen=True)
class Site:
    """A value, by its node's name, with its readers and the dimension and number of its channels."""

    name: str
    value: str
    kind: Kind
    channel_dim: int
    channels: int
    activations: ActivationFormat
    readers: tuple[Reader, ...]

    @property
    def shift_refusal(self) -> str | None:
        """Why the value cannot be shifted, or None."""
        pads = [r.path or r.node for r in self.readers if r.pads]
        return f"{', '.join(pads)} pads with zeros, which a shift would have to move too" if pads else None

    @property
    def bits(self) -> int:
        """Width of the activation's codes."""
        return int(getattr(self.activations, "bits", 8))

    @property
    def granularity(self) -> str:
        """Which values share a dynamic range (`quantize_dequantize`)."""
        return "sample" if self.kind == "convolutions" and self.activations.mode == "dynamic" else "token"

    def weight_maximum(self) -> Tensor:
        """Largest magnitude of each input channel over all readers' weights, float64 `[K]`."""
        return torch.stack(
            [r.weight.double().abs().transpose(0, 1).flatten(1).amax(1) for r in self.readers]
        ).amax(0)


def along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """`vector [K]` shaped to broadcast along dimension `dim` of x."""
    return vector.reshape([-1 if i == dim % x.dim() else 1 for i in range(x.dim())])


def added(vector: Tensor, y: Tensor, ids: Tensor | None, experts: int, dim: int) -> Tensor:
    """`vector [N]` shaped to be added to y along `dim`; of experts (`[E N]`) the part of each row's own."""
    if ids is None:
        return along(vector, y, dim)
    # Rows without an expert get nothing, as in the operator.
    own = torch.cat([vector.unflatten(0, (experts, -1)), vector.new_zeros(1, len(vector) // experts)])
    return own[torch.where((ids >= 0) & (ids < experts), ids, experts)]


def find_sites(program: Program, recipe: Recipe) -> list[Site]:
    """The sites of all layers that `recipe` will quantize, in graph order.

    Layers that the recipe leaves in float, that cannot be quantized, or whose weight or input is already quantized have
    none. Raises InputError where a weight holds NaN or infinity.
    """
    editor = Editor(program)
    found: dict[tuple[fx.Node, ActivationFormat, Kind], list[tuple[Layer, Any]]] = {}
    for kind in KINDS:
        for layer, chosen, reason in selected(editor, recipe, kind):
            if reason is None and _is_float_value(layer.input):
                form = activation_format(recipe, layer)
                found.setdefault((layer.input, form, kind), []).append((layer, chosen))
    check_finite(editor, [layer for group in found.values() for layer, _ in group])
    order = {node: index for index, node in enumerate(editor.graph.nodes)}
    ordered = sorted(found.items(), key=lambda entry: order[entry[1][0][0].node])
    return [_site(editor, *key, group) for key, group in ordered]


def _is_float_value(x: fx.Node) -> bool:
    return dtype(x) == torch.float32 and not is_call_of(x, *ROUNDERS)


def _site(
    editor: Editor, x: fx.Node, form: ActivationFormat, kind: Kind, group: list[tuple[Layer, Any]]
) -> Site:
    readers = tuple(_reader(editor, layer, chosen) for layer, chosen in group)
    channels = static_size(readers[0].weight.shape[1])
    assert channels is not None
    return Site(
        name=readers[0].node,
        value=x.name,
        kind=kind,
        channel_dim=-1 if kind == "weights" else 1,
        channels=channels,
        activations=form,
        readers=readers,
    )


def _reader(editor: Editor, layer: Layer, chosen: Any) -> Reader:
    weight = editor.tensor(layer.weight)
    assert weight is not None
    if layer.is_grouped:
        return _grouped_reader(layer, weight.detach(), chosen)
    assert isinstance(layer.node.target, torch._ops.OpOverload)
    operator = layer.node.target
    rest = {
        declared.name: argument(layer.node, declared.name)
        for declared in operator._schema.arguments
        if declared.name not in ("input", "weight", "bias")
    }

    def run(x: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
        found: Tensor = operator(x, weight, None, **rest)
        return found

    return Reader(layer.node.name, layer.path, weight.detach(), chosen, run, pads(layer))


def _grouped_reader(layer: Layer, weight: Tensor, chosen: Any) -> Reader:
    experts = len(weight)

    def run(x: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None, "rows of experts come with what they chose"
        found: Tensor = linear_grouped.overload(x, ids, weight.unflatten(0, (experts, -1)))
        return found

    chooser = argument(layer.node, "expert").name
    return Reader(
        layer.node.name,
        layer.path,
        weight.flatten(0, 1),
        chosen,
        run,
        False,
        experts=experts,
        chooser=chooser,
    )


def pads(layer: Layer) -> bool:
    """Whether the layer puts zeros around its input (a convolution with padding)."""
    if layer.kind != "convolutions":
        return False
    padding = argument(layer.node, "padding")
    if isinstance(padding, str):
        return padding != "valid" and any(k > 1 for k in layer.weight.meta["val"].shape[2:])
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def check_names(transforms: Mapping[str, EdgeTransform], sites: list[Site]) -> None:
    """Raise InputError that lists every transform without a site, and every vector of a wrong length."""
    by_name = {site.name: site for site in sites}
    problems = [f"{name!r} is no site" for name in transforms if name not in by_name]
    for name, transform in transforms.items():
        for part, vector in (("scale", transform.scale), ("shift", transform.shift)):
            if name in by_name and vector is not None and len(vector) != by_name[name].channels:
                problems.append(f"{name!r}: {part} of {len(vector)} for {by_name[name].channels} channels")
    if problems:
        raise InputError(
            "Transforms do not fit the program's sites",
            expected=f"names of the {len(sites)} sites: {', '.join(list(by_name)[:5])}{' ...' * (len(sites) > 5)}",
            got="; ".join(problems),
            hint="list the sites with passes.sites.find_sites(program, recipe)",
        )
