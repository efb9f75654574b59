"""A linear's weight is split into a part that is rounded and a thin one of low rank that stays float.

    y = x W^T + b   =   x (W - B A)^T + b + (x A^T) B^T,   A [r, K] of 8 bits, B [N, r]

Exact over the reals for any A and B, so it runs before anything is rounded, whatever the format. The pair is chosen for
what follows: with Q the rounding of the layer's format and R_0 = W,

    B A = best approximation of rank r of W - Q(R_i),   R_{i+1} = W - B A

where A is rounded to codes of 8 bits with a scale a row and B is the best for that A: with one row of activations K r
floats took as long to read as a thirtieth of the weight of 4 bits, and ONNX Runtime reads them as 16 columns.

The first step is LoRC's (ZeroQuant-V2, arXiv 2303.08302: B A makes up for the error of Q(W)) and the later ones
are LQ-LoRA's (arXiv 2311.12023). The part R_1 is rounded anew, and as Q takes the nearest codes that leaves no more
error than LoRC's W - Q(W) - B A would: R_1 - Q(R_1) is no farther from zero than R_1 - Q(W).

Side conditions: a constant float32 weight that nothing else reads in float (`layers.selected`); r at most a quarter of
both sides, else the thin part holds a good share of the weight. A layer whose rounded weight comes no nearer to W with
the thin part is left as it was, and refused.

REAL; W - B A is computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.dialect import linear_packed_float
from ..compiler.dialect.packing import pack_linear
from ..compiler.editor import Editor
from ..compiler.graph import argument
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe, WeightFormat
from .layers import Layer, check_finite, constant_name, selected
from .rounded_weight import rounded_weight

ROUNDS = 2
"""Times that the pair is found; a third changes the error of int4 and int3 by less than one percent of it."""

CODES = 127
"""Largest code of A."""

LEAST = 1e-30
"""Least scale of a row of A, which may be zero."""

aten = torch.ops.aten


@dataclass(frozen=True)
class _Split:
    """A as codes `[r, K]` and a scale `[r, 1]`, and up `[r, N]` = B^T; the relative errors of the rounded weight
    without and with them."""

    rest: Tensor
    codes: Tensor
    scale: Tensor
    up: Tensor
    before: float
    after: float

    @property
    def down(self) -> Tensor:
        """`[K, r]` = A^T, float64."""
        return (self.codes.double() * self.scale.double()).T


@define_pass(Guarantee.REAL)
def split_low_rank(editor: Editor, *, recipe: Recipe) -> None:
    """Split selected linears whose weight format has a `low_rank`. Raises InputError for NaN or infinite weights."""
    chosen: list[tuple[Layer, WeightFormat]] = []
    for layer, form, reason in selected(editor, recipe, "weights"):
        if form.low_rank and reason is None:
            chosen.append((layer, form))
        elif form.low_rank:
            editor.refused(layer.node, reason or "")
    check_finite(editor, [layer for layer, _ in chosen])
    for layer, form in chosen:
        weight = editor.tensor(layer.weight)
        assert weight is not None
        if 4 * form.low_rank > min(weight.shape):
            editor.refused(
                layer.node, f"rank {form.low_rank} is over a quarter of its {list(weight.shape)} weight"
            )
            continue
        found = _split(weight, form)
        if found.after >= found.before:
            editor.refused(
                layer.node,
                f"rank {form.low_rank} brings nothing: relative error {found.before:.2e} without, "
                f"{found.after:.2e} with",
            )
            continue
        _write(editor, layer, found, form.low_rank)


def _split(weight: Tensor, form: WeightFormat) -> _Split:
    exact = weight.detach().double()
    size = float(exact.norm()) or 1.0
    rounded = rounded_weight(weight, form)
    before = float((exact - rounded).norm()) / size
    for _ in range(ROUNDS):
        # As stored: what is subtracted is the product of exactly these numbers.
        codes, scale, up = _factors(exact - rounded, form.low_rank)
        rest = exact - (up.double().T @ (codes.double() * scale.double()))
        rounded = rounded_weight(rest.float(), form)
    return _Split(rest.float(), codes, scale, up, before, float((rest - rounded).norm()) / size)


def _factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A of 8 bits, `[r, K]` and `[r, 1]`, and B^T `[r, N]`, the best for it, with B A near the best of its rank for
    `error`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, v = torch.svd_lowrank(error.float(), q=min(rank + 8, *error.shape), niter=4)
    directions = v[:, :rank].double().T
    scale = (directions.abs().amax(1, keepdim=True) / CODES).clamp_min(LEAST).float()
    codes = (directions / scale.double()).round().clamp(-CODES, CODES).to(torch.int8)
    held = codes.double() * scale.double()
    up = torch.linalg.lstsq(held.T, error.double().T).solution
    return codes, scale, up.float()


def _write(editor: Editor, layer: Layer, found: _Split, rank: int) -> None:
    node = layer.node
    stored = pack_linear(found.codes, found.scale, None, 8, 0)
    down, scale, up = (
        editor.constant(part, constant_name(editor, layer.weight, f"low_rank_{name}"))
        for name, part in (("down", stored.weight), ("scale", stored.scale), ("up", found.up))
    )
    rest = editor.constant(found.rest, editor.name_of(layer.weight))
    x = argument(node, "input")
    tail = (None, None, None, stored.n, stored.k, 8, 0, stored.scale_multiplier, "none", False)
    narrow = editor.call(linear_packed_float.overload, x, down, scale, *tail, like=node)
    thin = editor.call(aten.matmul.default, narrow, up, like=node)
    linear = editor.call(node.target, x, rest, *node.args[2:], like=node)
    total = editor.call(aten.add.Tensor, linear, thin, like=node)
    editor.applied(
        total,
        f"rank {rank} beside the rounded weight: relative error {found.before:.2e} → {found.after:.2e}",
        rank=rank,
        error_before=found.before,
        error_after=found.after,
        bytes_added=stored.nbytes + 4 * found.up.numel(),
    )
    editor.replace(node, total)
