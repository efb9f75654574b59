"""A linear's weight is split into a part that is rounded and a thin one of low rank that stays float.

    y = x W^T + b   =   x (W - B A)^T + b + (x A^T) B^T,   A [r, K], B [N, r]

Exact over the reals for any A and B, so it runs before anything is rounded, whatever the format. The pair is chosen for
what follows: with Q the rounding of the layer's format and R_0 = W,

    B A = best approximation of rank r of W - Q(R_i),   R_{i+1} = W - B A

whose first step is LoRC's (ZeroQuant-V2, arXiv 2303.08302: B A makes up for the error of Q(W)) and whose later ones
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

from ..compiler.editor import Editor
from ..compiler.graph import argument
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe, WeightFormat
from .layers import Layer, check_finite, constant_name, selected
from .rounded_weight import rounded_weight

ROUNDS = 2
"""Times that the pair is found; a third changes the error of int4 and int3 by less than one percent of it."""

aten = torch.ops.aten


@dataclass(frozen=True)
class _Split:
    """down `[K, r]` = A^T and up `[r, N]` = B^T; the relative errors of the rounded weight without and with them."""

    rest: Tensor
    down: Tensor
    up: Tensor
    before: float
    after: float


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
        down, up = (part.float() for part in _factors(exact - rounded, form.low_rank))
        rest = exact - (down.double() @ up.double()).T
        rounded = rounded_weight(rest.float(), form)
    return _Split(rest.float(), down, up, before, float((rest - rounded).norm()) / size)


def _factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[K, r]` and `[r, N]` of equal size whose product is the best of its rank for `error^T`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(error.float(), q=min(rank + 8, *error.shape), niter=4)
    root = s[:rank].double().sqrt()
    return v[:, :rank].double() * root, (u[:, :rank].double() * root).T


def _write(editor: Editor, layer: Layer, found: _Split, rank: int) -> None:
    node = layer.node
    down, up = (
        editor.constant(part, constant_name(editor, layer.weight, name))
        for name, part in (("low_rank_down", found.down), ("low_rank_up", found.up))
    )
    rest = editor.constant(found.rest, editor.name_of(layer.weight))
    x = argument(node, "input")
    thin = editor.call(
        aten.matmul.default, editor.call(aten.matmul.default, x, down, like=node), up, like=node
    )
    linear = editor.call(node.target, x, rest, *node.args[2:], like=node)
    total = editor.call(aten.add.Tensor, linear, thin, like=node)
    editor.applied(
        total,
        f"rank {rank} beside the rounded weight: relative error {found.before:.2e} → {found.after:.2e}",
        rank=rank,
        error_before=found.before,
        error_after=found.after,
        bytes_added=4 * (found.down.numel() + found.up.numel()),
    )
    editor.replace(node, total)
