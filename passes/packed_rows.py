"""The rows of packed linears, as values that can be selected, joined and written back.

Every tensor of a packed matrix (docs/dialect.md) has one index that runs over output features, 16 to a
block. Read with that index first, selecting, reordering and joining output features are row operations on
the stored bytes: no code is decoded, so they are BITWISE. The one exception is the shared power-of-two
multiplier of group scales: joining brings all to the largest, and says so where float16 cannot hold a scale
after that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.dialect import (
    linear_codebook,
    linear_coded,
    linear_fp8,
    linear_outliers,
    linear_outliers_float,
    linear_packed,
    linear_packed_float,
)
from ..compiler.dialect.outlier_packing import outlier_rows, pack_outliers
from ..compiler.dialect.packing import LANES, ceil_to, interleave_gated
from ..compiler.editor import Editor
from ..compiler.graph import argument

LINEARS = (
    linear_packed.overload,
    linear_packed_float.overload,
    linear_outliers.overload,
    linear_outliers_float.overload,
    linear_coded.overload,
    linear_fp8.overload,
    linear_codebook.overload,
)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by their schema names, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return {declared.name: argument(node, declared.name) for declared in target._schema.arguments}


def call_with(editor: Editor, node: fx.Node, before: fx.Node | None = None, **changes: Any) -> fx.Node:
    """The call of `node` again, with some arguments changed (dialect operators: all are positional)."""
    given = arguments(node)
    assert changes.keys() <= given.keys(), f"{node.target} has no argument {changes.keys() - given.keys()}"
    return editor.call(node.target, *{**given, **changes}.values(), like=node, before=before)


def is_plain(linear: fx.Node) -> bool:
    """Whether nothing follows the linear and its bias inside the operator."""
    given = arguments(linear)
    return given["activation"] == "none" and given["residual"] is None and not given["gated"]


def inputs(linear: fx.Node) -> tuple[object, ...]:
    """The values that a linear multiplies."""
    given = arguments(linear)
    return (given["u"], given["params"]) if "u" in given else (given["x"],)


def reads(linear: fx.Node) -> tuple[object, ...]:
    """What linears must agree on to be one: operator, input, and what its codes mean and how they lie along K."""
    given = arguments(linear)
    layout = ("k", "bits", "group_size", "format", "table", "codebooks")
    return (linear.target, *inputs(linear), *(given.get(name) for name in layout))


@dataclass(frozen=True)
class PackedRows:
    """Output features of a packed linear: each tensor has one entry for each of them in dimension 0."""

    weight: Tensor
    """Bytes `[N, C, 4]`, int3 `[N, C, 3, 4]`."""
    scale: Tensor
    """`[N, G]`, as stored."""
    zero: Tensor | None
    wsum: Tensor | None
    bias: Tensor | None
    multiplier: float
    places: Tensor | None = None
    """Of outliers, `[N, J]`, like their `values` (0: none)."""
    values: Tensor | None = None
    outlier_multiplier: float = 1.0

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedRows:
        """`change` applied to every tensor."""

        def maybe(t: Tensor | None) -> Tensor | None:
            return None if t is None else change(t)

        names = ("weight", "scale", "zero", "wsum", "bias", "places", "values")
        changed: dict[str, Any] = {name: maybe(getattr(self, name)) for name in names}
        return replace(self, **changed)

    def select(self, index: Tensor) -> PackedRows:
        """The rows `index` (int64), in that order."""
        return self.map(lambda t: t[index])


def read_rows(editor: Editor, linear: fx.Node) -> PackedRows | None:
    """The rows of a packed linear, or None where one of its tensors is not a constant."""
    given = arguments(linear)
    parts: dict[str, Tensor | None] = {}
    for name in ("weight", "scale", "zero", "wsum", "bias", "places", "values", "offsets"):
        node = given.get(name)
        parts[name] = editor.tensor(node)
        if node is not None and parts[name] is None:
            return None
    weight, scale, zero = parts["weight"], parts["scale"], parts["zero"]
    assert weight is not None
    assert scale is not None
    rows = PackedRows(
        weight.movedim(-2, 1).flatten(0, 1),
        scale.permute(0, 2, 1).flatten(0, 1),
        None if zero is None else zero.permute(0, 2, 1).flatten(0, 1),
        parts["wsum"],
        parts["bias"],
        given.get("scale_multiplier", 1.0),
    )
    places, values, offsets = parts["places"], parts["values"], parts["offsets"]
    if places is not None and values is not None and offsets is not None:
        at, held = outlier_rows(places, values, offsets)
        rows = replace(rows, places=at, values=held, outlier_multiplier=given["outlier_multiplier"])
    count = 2 * ceil_to(given["n"], LANES) if given["gated"] else given["n"]
    return rows.map(lambda t: t[:count])


def join(parts: Sequence[PackedRows]) -> list[PackedRows] | str:
    """The parts with one multiplier, and zeros and biases in all where one has them; or why that is not exact."""
    multiplier = max(part.multiplier for part in parts)
    if not parts[0].scale.is_floating_point() and any(part.multiplier != multiplier for part in parts):
        return "their tensors' scales differ, and codes of group scales cannot take up the ratio"
    outliers = max(part.outlier_multiplier for part in parts)
    widest = max(0 if part.places is None else part.places.shape[1] for part in parts)
    joined = []
    for part in parts:
        scale = (part.scale.to(torch.float32) * (part.multiplier / multiplier)).to(part.scale.dtype)
        back = scale.to(torch.float32) * (multiplier / part.multiplier)
        if not torch.equal(back, part.scale.to(torch.float32)):
            return "their group scales are too far apart for one float16 multiplier"
        count = len(part.scale)
        zero, bias = part.zero, part.bias
        if zero is None and any(p.zero is not None for p in parts):
            zero = torch.zeros(scale.shape, dtype=torch.int8)
        if bias is None and any(p.bias is not None for p in parts):
            bias = torch.zeros(count)
        places, values = part.places, part.values
        if places is not None and values is not None:
            values = _rescaled(values, part.outlier_multiplier / outliers)
            if values is None:
                return "their outliers are too far apart for one float16 multiplier"
            places, values = (F.pad(t, (0, widest - t.shape[1])) for t in (places, values))
        joined.append(
            PackedRows(part.weight, scale, zero, part.wsum, bias, multiplier, places, values, outliers)
        )
    return joined


def _rescaled(values: Tensor, factor: float) -> Tensor | None:
    """float16 values times a power of two, None where that is not exact."""
    moved = (values.double() * factor).half()
    return moved if torch.equal(moved.double() / factor, values.double()) else None


def concatenate(parts: Sequence[PackedRows]) -> PackedRows | str:
    """All rows, one part after the other, or why they cannot be."""
    joined = join(parts)
    return joined if isinstance(joined, str) else _combine(joined, lambda *tensors: torch.cat(tensors))


def interleave(gate: PackedRows, up: PackedRows) -> PackedRows | str:
    """The rows of a gated pair in blocks of 16, each half padded to whole blocks, or why they cannot be."""
    joined = join([gate, up])
    return joined if isinstance(joined, str) else _combine(joined, interleave_gated)


def _combine(parts: list[PackedRows], combine: Callable[..., Tensor]) -> PackedRows:
    def of(name: str) -> Any:
        return None if getattr(parts[0], name) is None else combine(*(getattr(part, name) for part in parts))

    names = ("weight", "scale", "zero", "wsum", "bias", "places", "values")
    return replace(parts[0], **{name: of(name) for name in names})


def write_rows(editor: Editor, linears: Sequence[fx.Node], rows: PackedRows) -> dict[str, Any]:
    """New constants that hold `rows`, named after those of `linears`: changes for `call_with`."""
    count = len(rows.weight)
    whole = rows.map(lambda t: F.pad(t, [0, 0] * (t.dim() - 1) + [0, ceil_to(count, LANES) - count]))
    tensors: dict[str, Tensor | None] = {
        "weight": whole.weight.unflatten(0, (-1, LANES)).movedim(1, -2),
        "scale": whole.scale.unflatten(0, (-1, LANES)).permute(0, 2, 1),
        "zero": None if whole.zero is None else whole.zero.unflatten(0, (-1, LANES)).permute(0, 2, 1),
        "wsum": whole.wsum,
        "bias": rows.bias,
    }
    known = arguments(linears[0])
    changes: dict[str, Any] = {"scale_multiplier": rows.multiplier} if "scale_multiplier" in known else {}
    if rows.places is not None and rows.values is not None:
        held = pack_outliers(rows.places, rows.values, known["k"], rows.outlier_multiplier)
        tensors |= {"places": held.places, "values": held.values, "offsets": held.offsets}
        changes["outlier_multiplier"] = rows.outlier_multiplier
    for name, tensor in tensors.items():
        nodes = [arguments(linear).get(name) for linear in linears]
        if tensor is None:
            if name != "wsum" and name in known:
                changes[name] = None
            continue
        names = [editor.name_of(node) for node in nodes if isinstance(node, fx.Node)]
        changes[name] = editor.constant(tensor, joined_name(names))
    return changes


def joined_name(names: Sequence[str]) -> str:
    """One name for what several constants became: `a.q.packed`, `a.k.packed` → `a.q_k.packed`."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        return f"{names[0]}_fused"
    pieces = ["_".join(dict.fromkeys(level)) for level in zip(*split, strict=True)]
    return ".".join(pieces) if len(names) > 1 else f"{names[0]}_fused"
