"""Linears whose weights are mostly zero skip the zeros, where that is faster.

    linear(x, W) + b                      → linear_sparse_float(x, values of W, b)      W a float32 constant
    linear_packed(u, codes, scale, ...)   → linear_sparse(u, codes that are not 0, scale, ...)

For each layer: which pattern the zeros make (`sparsity_patterns`), in which layouts the matrix can be stored
(`sparse_candidates`), and how fast each is predicted to be beside the dense linear at this number of rows
(`sparse_speed`). The fastest is taken; where it is not faster by `sparsity.gain` the layer stays dense, and the refusal
says how far it is from paying. Blocks with a bitmask of the rest would be two operators: they are predicted too, and
reported where they would be faster than what was chosen, but not built.

BITWISE in what is stored: codes and values are kept bit for bit, and zeros are left out of sums. The guarantee is REAL,
as the order of the remaining sums may differ.

Side conditions: weights are constants; codes have 8 bits and one symmetric scale a row, or 4 bits and symmetric scales
(with zero points a zero weight has a code that is not 0). The number of rows is that of the program's example inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import linear_packed, linear_packed_float, linear_sparse, linear_sparse_float
from ..compiler.dialect.linear_packed import packed_rows
from ..compiler.dialect.packing import unpack_codes
from ..compiler.dialect.sparse_packing import PackedSparse, pack_sparse
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, module_path, value
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe, Sparsity
from .layers import constant_name
from .packed_rows import arguments
from .sparse_candidates import Candidate, candidates, mixture
from .sparse_speed import break_even, dense_time
from .sparsity_patterns import Pattern, pattern_of

aten = torch.ops.aten

FEWEST_ZEROS = 0.05
"""A layer with fewer zeros than this is dense, and nothing is said about it."""


@define_pass(Guarantee.REAL)
def extract_sparsity(editor: Editor, *, recipe: Recipe) -> None:
    """Store the weights of linears as non-zeros where the recipe's `sparsity` allows and it pays."""
    made: dict[tuple[fx.Node, str, str], tuple[PackedSparse, dict[str, fx.Node]]] = {}
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
        kind = "float32" if node.target == aten.linear.default else f"int{argument(node, 'bits')}"
        pattern, rows = pattern_of(matrix), _rows(node)
        found = candidates(matrix, kind, rows, form.layout)
        if not found:
            editor.refused(node, f"{kind}, {pattern.name}: the layout {form.layout} does not hold it")
            continue
        best = found[0]
        dense = dense_time(kind, rows, matrix.numel(), held.numel() * held.element_size())
        if dense < best.nanoseconds * form.gain:
            editor.refused(
                node, _reason(kind, pattern, rows, best, dense, form) + _mixed(matrix, rows, kind, best)
            )
            continue
        key = (weight, best.layout, best.value)
        if key not in made:
            made[key] = _store(editor, weight, matrix, kind, best)
        packed, nodes = made[key]
        new = _call(editor, node, packed, nodes)
        editor.replace(node, new)
        facts = _facts(held, packed, pattern, rows, kind, best, dense)
        facts["candidates"] = {f"{c.layout} {c.value}": c.nanoseconds / 1e3 for c in found}
        editor.applied(new, _what(matrix, pattern, rows, kind, best, dense), **facts)


def _what(matrix: Tensor, pattern: Pattern, rows: int, kind: str, best: Candidate, dense: float) -> str:
    empty = "".join(
        f", {count} empty {name}"
        for count, name in ((pattern.empty_rows, "rows"), (pattern.empty_columns, "columns"))
        if count
    )
    text = (
        f"{matrix.shape[0]} x {matrix.shape[1]}, {pattern.name}{empty}: {pattern.density:.1%} are not zero, stored as "
        f"{best.layout} of {best.value}, predicted {dense / best.nanoseconds:.2f} times the dense speed"
    )
    return text + _mixed(matrix, rows, kind, best)


def _mixed(matrix: Tensor, rows: int, kind: str, best: Candidate) -> str:
    """What a mixture would be, where it would be faster."""
    mixed = mixture(matrix, kind, rows)
    if mixed is None or mixed[1] >= best.nanoseconds:
        return ""
    name, time = mixed
    return f" ({name}, as two operators, would take {time / best.nanoseconds:.2f} times as long: not built)"


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
    if given["bits"] != 4 and (given["bits"] != 8 or given["group_size"]):
        found = f"int{given['bits']} in groups of {given['group_size']}"
        return f"{found} has no sparse kernel (int8 with a scale a row and int4 have)"
    if given["zero"] is not None:
        return "its weights have zero points, so that a zero weight is not a zero code"
    return unpack_codes(held, packed_rows(given["n"], given["gated"]), given["k"], given["bits"])


def _share_of_zeros(held: Tensor) -> float:
    return float((held == 0).float().mean()) if held.numel() else 0.0


def _rows(node: fx.Node) -> int:
    made = value(node)
    assert isinstance(made, Tensor)
    return max(int(made.numel()) // max(int(made.shape[-1]), 1), 1)


def _facts(
    held: Tensor, packed: PackedSparse, pattern: Pattern, rows: int, kind: str, best: Candidate, dense: float
) -> dict[str, Any]:
    size = held.numel() * held.element_size()
    return {
        "pattern": pattern.name,
        "density": pattern.density,
        "empty_rows": pattern.empty_rows,
        "empty_columns": pattern.empty_columns,
        "layout": best.layout,
        "values": best.value,
        "stored": packed.density,
        "rows": rows,
        "break_even": break_even(best.layout, best.value, rows, kind),
        "predicted_speedup": dense / best.nanoseconds,
        "saved_microseconds": (dense - best.nanoseconds) / 1e3,
        "dense_bytes": size,
        "sparse_bytes": packed.nbytes,
        "saved_bytes": size - packed.nbytes,
    }


def _reason(kind: str, pattern: Pattern, rows: int, best: Candidate, dense: float, form: Sparsity) -> str:
    at = f"{rows} row{'s' if rows > 1 else ''} of activations"
    limit = break_even(best.layout, best.value, rows, kind)
    enough = (
        f"it pays where up to {limit:.0%} of the weights are stored"
        if limit
        else "it does not pay at any density"
    )
    return (
        f"{kind}, {pattern.name}: at a density of {pattern.density:.0%} and {at} it is predicted to run at "
        f"{dense / best.nanoseconds:.2f} times the dense speed as {best.layout} of {best.value}, less than "
        f"{form.gain:g}; "
        f"{enough}"
    )


def _store(
    editor: Editor, weight: fx.Node, matrix: Tensor, kind: str, best: Candidate
) -> tuple[PackedSparse, dict[str, fx.Node]]:
    chosen = matrix.bfloat16() if best.value == "bfloat16" else matrix
    packed = pack_sparse(chosen, best.layout, 4 if kind == "int4" else 8)
    parts = {"places": packed.places, "values": packed.values, "offsets": packed.offsets}
    nodes = {
        part: editor.constant(tensor, constant_name(editor, weight, f"sparse_{part}"))
        for part, tensor in parts.items()
    }
    return packed, nodes


def _call(editor: Editor, node: fx.Node, packed: PackedSparse, nodes: dict[str, fx.Node]) -> fx.Node:
    stored = (nodes["places"], nodes["values"], nodes["offsets"])
    if node.target == aten.linear.default:
        x, bias = argument(node, "input"), argument(node, "bias")
        tail = (bias, None, packed.n, packed.k, packed.layout, "none", False)
        return editor.call(linear_sparse_float.overload, x, *stored, *tail, like=node)
    a = arguments(node)
    first = (a[name] for name in ("scale", "wsum", "bias", "residual", "n", "k"))
    last = (a[name] for name in ("group_size", "scale_multiplier", "activation", "gated"))
    form = (packed.layout, packed.bits)
    return editor.call(linear_sparse.overload, a["u"], a["params"], *stored, *first, *form, *last, like=node)
