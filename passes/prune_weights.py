"""The smallest weights of linears become zero.

    unstructured: the largest `density` of each layer's weights stay      N:M: the N largest of every M inputs stay

LOSSY: magnitude pruning without retraining, the error of each layer is reported. It is meant for weights that were
trained with this sparsity (it then changes nothing: what is zero already goes first) and for studies of speed; at 50 %
and more of a model that was not, expect another model.

A layer that has fewer non-zeros than asked for is left alone. Refused: weights that are computed or not float32
matrices, and those that something else than a linear reads too (an embedding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.dialect import dequantize_weight
from ..compiler.editor import Editor
from ..compiler.graph import dtype, place_of
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Prune, Recipe
from .layers import OPERATORS, called, check_finite, is_call_of, layers


@define_pass(Guarantee.LOSSY)
def prune_weights(editor: Editor, *, recipe: Recipe) -> None:
    """Prune the weights of linears as the recipe's `prune` says. Raises InputError for NaN or infinite weights."""
    chosen = []
    done: set[fx.Node] = set()
    for layer in layers(editor):
        form = recipe.format_for(layer.path, "prune") if layer.kind == "weights" else None
        if (
            form is None
            or form.structure is not None
            or layer.weight in done
            or is_call_of(layer.weight, dequantize_weight.overload)
        ):
            continue
        weight = editor.tensor(layer.weight)
        if weight is None:
            editor.refused(layer.node, "its weight is computed in the graph, not a constant")
        elif weight.dim() != 2 or dtype(layer.weight) != torch.float32:
            editor.refused(
                layer.node, f"its weight is {weight.dtype} {list(weight.shape)}, not a float32 matrix"
            )
        elif others := [user for user in layer.weight.users if OPERATORS.get(user.target) != "weights"]:
            named = f"{called(others[0])} ({place_of(others[0])})"
            editor.refused(layer.node, f"its weight is also read by {named}, which would see it pruned")
        else:
            chosen.append((layer, form))
            done.add(layer.weight)
    check_finite(editor, [layer for layer, _ in chosen])
    for layer, form in chosen:
        weight = editor.tensor(layer.weight)
        assert weight is not None
        keep = kept(weight.detach(), form)
        pruned = torch.where(keep, weight.detach(), torch.zeros(()))
        lost = float((weight.detach() - pruned).double().square().sum())
        if not lost:
            editor.refused(
                layer.node, f"it already is as sparse: {float((weight != 0).float().mean()):.1%} are not zero"
            )
            continue
        error = math.sqrt(lost / float(weight.detach().double().square().sum()))
        editor.set_tensor(editor.name_of(layer.weight), pruned)
        density = float((pruned != 0).float().mean())
        editor.applied(
            layer.node,
            f"{1 - density:.1%} zeros ({form.pattern}), relative error {error:.2e}",
            density=density,
            pattern=form.pattern,
            weight_error=error,
        )


def kept(weight: Tensor, form: Prune) -> Tensor:
    """Which entries of a matrix `[N, K]` stay: bool, of the same shape. Ties go to the first."""
    n, k = weight.shape
    size = weight.abs()
    if form.density is not None:
        flat, count = size.flatten(), math.ceil(form.density * weight.numel())
        least = flat.kthvalue(flat.numel() - count + 1).values  # a sort takes ten times as long
        keep = flat > least
        keep[(flat == least).nonzero().flatten()[: count - int(keep.sum())]] = True
        return keep.reshape(n, k)
    some, of = (int(part) for part in form.pattern.split(":"))
    groups = F.pad(size, (0, -k % of), value=-1.0).unflatten(1, (-1, of))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :some]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, best, True).flatten(1)[:, :k]
