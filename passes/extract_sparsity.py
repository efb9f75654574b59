"""Linears whose weights are mostly zero skip the zeros, where that is faster.

    linear(x, W) + b                      → linear_sparse_float(x, non-zeros of W, b)      W a float32 constant
    linear_packed(u, codes, scale, ...)   → linear_sparse(u, non-zeros of codes, scale, ...)

For each layer: which pattern the zeros make (`sparsity_patterns`), how fast a bitmask with packed non-zeros is
beside the dense linear at this density and number of rows (`sparse_speed`), and from which density on it would be. All
patterns are stored as that bitmask. A layer that is not predicted to be faster by `sparsity.gain` stays dense, and the
refusal says how far it is from paying.

BITWISE in what is stored: codes and values are kept bit for bit, and zeros are left out of sums. The guarantee is REAL,
as the order of the remaining sums may differ.

Side conditions: weights are constants; int8 codes have one symmetric scale a row (with zero points a zero weight has a
code that is not 0; other widths have no sparse kernel). The number of rows is that of the program's example inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import linear_packed, linear_packed_float, linear_sparse, linear_sparse_float
from ..compiler.dialect.linear_packed import packed_rows
from ..compiler.dialect.packing import unpack_codes
from ..compiler.dialect.sparse_packing import PackedSparse, pack_sparse, sparse_bytes
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, module_path, value
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe
from .layers import constant_name
from .packed_rows import arguments
from .sparse_speed import break_even, speedup
from .sparsity_patterns import Pattern, pattern_of

aten = torch.ops.aten

FEWEST_ZEROS = 0.05
"""A layer with fewer zeros than this is dense, and nothing is said about it."""


@define_pass(Guarantee.REAL)
def extract_sparsity(editor: Editor, *, recipe: Recipe) -> None:
    """Store the weights of linears as non-zeros where the recipe's `sparsity` allows and it pays."""
    made: dict[tuple[fx.Node, bool], tuple[PackedSparse, dict[str, fx.Node]]] = {}
    for node in editor.calls(aten.linear.default, linear_packed.overload, linear_packed_float.overload):
        form = recipe.format_for(module_path(node), "sparsity")
        if form is None or form.mode == "off":
            continue
        weight = argument(node, "weight")
        held = editor.tensor(weight)
        if held is None:
            continue
        matrix = _matrix(node, held)
        if isinstance(matrix, str):
            if _share_of_zeros(held) >= FEWEST_ZEROS:
                editor.refused(node, matrix)
            continue
        if float((matrix == 0).float().mean()) < FEWEST_ZEROS:
            continue
        kind = "int8" if node.target == linear_packed.overload else "float32"
        pattern, rows = pattern_of(matrix), _rows(node)
        limit, gain = break_even(kind, rows), speedup(kind, rows, pattern.density)
        facts = _facts(matrix, held, pattern, rows, limit, gain)
        if gain < form.gain:
            editor.refused(node, _reason(kind, pattern, rows, limit, gain, form.gain))
            continue
        key = (weight, kind == "int8")
        if key not in made:
            made[key] = _store(editor, weight, matrix)
        new = _call(editor, node, *made[key])
        editor.replace(node, new)
        empty = f", {pattern.empty_rows} empty rows" if pattern.empty_rows else ""
        what = f"{kind} {matrix.shape[0]} x {matrix.shape[1]}, {pattern.name}{empty}: {pattern.density:.1%} stored"
        editor.applied(new, f"{what}, predicted {gain:.2f} times the dense speed", **facts)


def _matrix(node: fx.Node, held: Tensor) -> Tensor | str:
    """The matrix whose non-zeros would be stored, or why it cannot be."""
    if node.target == aten.linear.default:
        if held.dim() != 2 or held.dtype != torch.float32 or dtype(node) != torch.float32:
            return f"its weight is {held.dtype} {list(held.shape)}: sparse kernels read float32 matrices"
        if not torch.isfinite(held).all():
            return "its weight holds NaN or infinity"
        return held.detach()
    if node.target == linear_packed_float.overload:
        return "codes with float activations have no sparse kernel (int8 activations or float32 weights have)"
    given = arguments(node)
    if given["bits"] != 8 or given["group_size"]:
        found = f"int{given['bits']} in groups of {given['group_size']}"
        return f"{found} has no sparse kernel (int8 with a scale a row has)"
    if given["zero"] is not None:
        return "its weights have zero points, so that a zero weight is not a zero code"
    return unpack_codes(held, packed_rows(given["n"], given["gated"]), given["k"], 8)


def _share_of_zeros(held: Tensor) -> float:
    return float((held == 0).float().mean()) if held.numel() else 0.0


def _rows(node: fx.Node) -> int:
    made = value(node)
    assert isinstance(made, Tensor)
    return max(int(made.numel()) // max(int(made.shape[-1]), 1), 1)


def _facts(
    matrix: Tensor, held: Tensor, pattern: Pattern, rows: int, limit: float, gain: float
) -> dict[str, Any]:
    n, k = matrix.shape
    after = sparse_bytes(n, k, int((matrix != 0).sum()), matrix.element_size())
    dense = held.numel() * held.element_size()
    return {
        "pattern": pattern.name,
        "density": pattern.density,
        "empty_rows": pattern.empty_rows,
        "empty_columns": pattern.empty_columns,
        "rows": rows,
        "break_even": limit,
        "predicted_speedup": gain,
        "dense_bytes": dense,
        "sparse_bytes": after,
        "saved_bytes": dense - after,
    }


def _reason(kind: str, pattern: Pattern, rows: int, limit: float, gain: float, wanted: float) -> str:
    at = f"{rows} row{'s' if rows > 1 else ''} of activations"
    enough = f"it pays up to a density of {limit:.0%}" if limit else "it does not pay at any density"
    return (
        f"{kind}, {pattern.name}: at a density of {pattern.density:.0%} and {at} it is predicted to run at "
        f"{gain:.2f} times the dense speed, less than {wanted:g}; {enough}"
    )


def _store(editor: Editor, weight: fx.Node, matrix: Tensor) -> tuple[PackedSparse, dict[str, fx.Node]]:
    packed = pack_sparse(matrix)
    parts = {"mask": packed.mask, "values": packed.values, "offsets": packed.offsets}
    nodes = {
        part: editor.constant(tensor, constant_name(editor, weight, f"sparse_{part}"))
        for part, tensor in parts.items()
    }
    return packed, nodes


def _call(editor: Editor, node: fx.Node, packed: PackedSparse, nodes: dict[str, fx.Node]) -> fx.Node:
    stored = (nodes["mask"], nodes["values"], nodes["offsets"])
    if node.target == aten.linear.default:
        x, bias = argument(node, "input"), argument(node, "bias")
        tail = (bias, None, packed.n, packed.k, "none", False)
        return editor.call(linear_sparse_float.overload, x, *stored, *tail, like=node)
    a = arguments(node)
    rest = (a[name] for name in ("scale", "wsum", "bias", "residual", "n", "k", "activation", "gated"))
    return editor.call(linear_sparse.overload, a["u"], a["params"], *stored, *rest, like=node)
