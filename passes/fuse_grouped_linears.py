"""Linears of experts that read the same rows with the same choice become one wider grouped linear (gate and up).

    linear_grouped_*(x, e, Wg), linear_grouped_*(x, e, Wu)
        → y = linear_grouped_*(x, e, [Wg; Wu]), y[:, 0:n], y[:, Np:Np + n]     Np: n in whole panels

A step then sorts rows by expert, puts them together and wakes its threads once. Every expert's panels lie one behind
the other, so that the stored bytes are joined as they are, whatever the width of codes.

Side conditions: packed alike (operator, k, bits, groups), tensors are constants; group scales fit one float16
multiplier. Others stay apart, with the reason.

Exactness: REAL; the stored bytes are moved, not changed, only the order of a float reference's sums may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.dialect import linear_grouped_dense, linear_grouped_packed, linear_grouped_packed_float
from ..compiler.dialect.dense_packing import PANEL
from ..compiler.dialect.packing import LANES, ceil_to
from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from .packed_rows import arguments, call_with, joined_name

aten = torch.ops.aten

GROUPED = (
    linear_grouped_packed.overload,
    linear_grouped_packed_float.overload,
    linear_grouped_dense.overload,
)
_INPUTS = ("u", "params", "x", "expert")
_LAYOUT = ("k", "bits", "group_size")


@define_pass(Guarantee.REAL)
def fuse_grouped_linears(editor: Editor) -> None:
    """See the module."""
    readers: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in editor.calls(*GROUPED):
        given = arguments(node)
        readers.setdefault(tuple(given.get(name) for name in _INPUTS), []).append(node)
    for linears in readers.values():
        alike: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in linears:
            given = arguments(node)
            alike.setdefault((node.target, *(given.get(name) for name in _LAYOUT)), []).append(node)
        if len(alike) > 1:
            editor.refused(
                linears[0], f"{len(linears)} linears of experts read one value, but are not packed alike"
            )
        for group in alike.values():
            if len(group) > 1:
                _join(editor, group)


def _join(editor: Editor, linears: Sequence[fx.Node]) -> None:
    first = linears[0]
    given = [arguments(node) for node in linears]
    panel = PANEL if first.target == linear_grouped_dense.overload else LANES
    tensors: list[dict[str, Tensor | None]] = []
    for call in given:
        names = [name for name in ("weight", "scale", "zero", "wsum", "bias") if call.get(name) is not None]
        held = {name: editor.tensor(call[name]) for name in names}
        if any(tensor is None for tensor in held.values()):
            editor.refused(first, "a tensor of experts that read one value is not a constant")
            return
        tensors.append(held)
    changes: dict[str, Any] = {}
    if "scale_multiplier" in given[0]:
        changes["scale_multiplier"] = largest = max(call["scale_multiplier"] for call in given)
        for call, held in zip(given, tensors, strict=True):
            scale = held["scale"]
            assert scale is not None
            held["scale"] = _rescaled(scale, call["scale_multiplier"] / largest)
        if any(held["scale"] is None for held in tensors):
            editor.refused(
                first, "group scales of experts that read one value are too far apart for one multiplier"
            )
            return
    widths = [ceil_to(call["n"], panel) for call in given]
    for held, call, width in zip(tensors, given, widths, strict=True):
        if held.get("bias") is not None and call is not given[-1]:
            held["bias"] = F.pad(held["bias"], (0, width - call["n"]))  # type: ignore[arg-type]  # not None
    experts = len(tensors[0]["weight"])  # type: ignore[arg-type]  # a weight is there
    missing: dict[str, Callable[[int], Tensor]] = {
        "zero": lambda i: torch.zeros_like(tensors[i]["scale"], dtype=torch.int8),  # type: ignore[arg-type]
        "bias": lambda i: torch.zeros(experts, given[-1]["n"] if i == len(given) - 1 else widths[i]),
    }
    for name in ("weight", "scale", "zero", "wsum", "bias"):
        parts = [held.get(name) for held in tensors]
        if all(part is None for part in parts):
            continue
        whole = [missing[name](i) if part is None else part for i, part in enumerate(parts)]
        names = [editor.name_of(call[name]) for call in given if call[name] is not None]
        changes[name] = editor.constant(torch.cat(whole, 1), joined_name(names))
    total = sum(widths[:-1]) + given[-1]["n"]
    wide = call_with(editor, first, **changes, n=total)
    start = 0
    for node, call, width in zip(linears, given, widths, strict=True):
        part = editor.call(aten.slice.Tensor, wide, 1, start, start + call["n"], 1, like=node)
        editor.replace(node, part)
        start += width
    editor.applied(
        wide, f"{len(linears)} linears of experts in one of {total} features", linears=len(linears)
    )


def _rescaled(scale: Tensor, factor: float) -> Tensor | None:
    """Scales times a power of two, None where that is not exact."""
    moved = (scale.double() * factor).to(scale.dtype)
    return moved if torch.equal(moved.double() / factor, scale.double()) else None
