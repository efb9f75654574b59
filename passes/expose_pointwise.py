"""Pointwise convolutions with zeros become linears between two permutations, where skipping the zeros then pays.

    conv(x, W[..., 1]) + b    →  permute(linear(permute(x, channels last), W) + b, channels first)

`extract_sparsity` stores the linear; what it is predicted to save must be more than the permutations cost (both read
and write their tensor once, PERMUTED bytes a nanosecond). Depthwise and other grouped convolutions, and those with a
stride or padding, are no linears of all positions and stay.

Side conditions: a kernel of one element, stride 1, no padding, one group, a constant float32 weight. Quantized
convolutions have kernels of their own, without zeros. Exactness: REAL (another order of one sum).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, module_path, shape, value
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe
from .layers import constant_name
from .sparse_mixtures import ways_to_store
from .sparse_speed import dense_time

aten = torch.ops.aten

PERMUTED = 8.0
"""Bytes a nanosecond, read and written, of a permutation."""

FEWEST_ZEROS = 0.05
"""A convolution with fewer zeros than this is dense, and nothing is said about it."""


@define_pass(Guarantee.REAL)
def expose_pointwise(editor: Editor, *, recipe: Recipe) -> None:
    """See the module."""
    for node in editor.calls(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        form = recipe.format_for(module_path(node), "sparsity")
        weight = editor.tensor(argument(node, "weight"))
        if form is None or form.mode == "off" or weight is None or dtype(node) != torch.float32:
            continue
        zeros = float((weight == 0).float().mean()) if weight.numel() else 0.0
        if zeros < FEWEST_ZEROS or not torch.isfinite(weight).all():
            continue
        if not _is_pointwise(node, weight):
            editor.refused(
                node, "only convolutions with a kernel of 1, stride 1, no padding and one group skip zeros"
            )
            continue
        matrix, made = weight.detach().flatten(1), value(node)
        assert isinstance(made, Tensor)
        rows = max(int(made.numel()) // max(len(matrix), 1), 1)
        best = ways_to_store(matrix, "float32", rows, form.layout)
        dense = dense_time("float32", rows, matrix.numel(), 4 * matrix.numel())
        moved = 2 * 4 * rows * sum(matrix.shape) / PERMUTED
        if not best or dense < (best[0].nanoseconds + moved) * form.gain:
            gain = f"{dense / (best[0].nanoseconds + moved):.2f}" if best else "no layout holds it: 0"
            editor.refused(
                node,
                f"pointwise, {zeros:.0%} zeros, {rows} positions: as a sparse linear between two permutations it is "
                f"predicted to run at {gain} times the dense speed, less than {form.gain:g}",
            )
            continue
        _rewrite(editor, node, matrix)


def _is_pointwise(node: fx.Node, weight: Tensor) -> bool:
    def all_are(name: str, wanted: int) -> bool:
        given = argument(node, name)
        return all(size == wanted for size in (given if isinstance(given, (list, tuple)) else [given]))

    batched = len(shape(argument(node, "input")) or ()) == weight.dim()
    plain = all_are("stride", 1) and all_are("padding", 0) and all_are("groups", 1)
    return batched and plain and all(size == 1 for size in weight.shape[2:])


def _rewrite(editor: Editor, node: fx.Node, matrix: Tensor) -> None:
    x, bias = argument(node, "input"), argument(node, "bias")
    rank = len(shape(x) or ())
    held = editor.constant(matrix.clone(), constant_name(editor, argument(node, "weight"), "matrix"))
    last = editor.call(aten.permute.default, x, [0, *range(2, rank), 1], like=node)
    given = (last, held) if bias is None else (last, held, bias)
    y = editor.call(aten.linear.default, *given, like=node)
    editor.applied(y, "a pointwise convolution with zeros is a linear between permutations")
    editor.replace(node, editor.call(aten.permute.default, y, [0, rank - 1, *range(1, rank - 1)], like=node))
