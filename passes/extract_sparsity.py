"""Linears whose weights are mostly zero skip the zeros, where that is faster.

    linear(x, W) + b                      → linear_sparse_float(x, values of W, b)      W a float32 constant
    linear_packed(u, codes, scale, ...)   → linear_sparse(u, codes that are not 0, scale, ...)
    either, W = B + R                     → the same twice: R's result is the residual of B's (`sparse_mixtures`)

For each layer: which pattern the zeros make (`sparsity_patterns`), in which layouts the matrix can be stored
(`sparse_candidates`), alone or two of them that share it, and how fast each is predicted to be beside the dense linear
at this number of rows (`sparse_speed`). The fastest is taken; where it is not faster by `sparsity.gain` the layer stays
dense, and the refusal says how far it is from paying.

A residual comes behind the activation, so the activation of a mixture is an operator of its own again (its time is
counted), and gated linears, whose rows are those of two factors, have no mixtures.

BITWISE in what is stored: codes and values are kept bit for bit, and zeros are left out of sums. The guarantee is REAL,
as the order of the remaining sums may differ.

Side conditions: weights are constants; codes have 8 bits and one symmetric scale a row, or 4 bits and symmetric scales
(with zero points a zero weight has a code that is not 0). The number of rows is that of the program's example inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.dialect import linear_packed, linear_packed_float
from ..compiler.dialect.linear_packed import packed_rows
from ..compiler.dialect.packing import unpack_codes
from ..compiler.dialect.sparse_packing import PackedSparse, pack_sparse
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, module_path, only_user, value
from ..compiler.passes import Guarantee, define_pass
from ..compiler.recipe import Recipe, Sparsity
from .fuse_epilogues import ACTIVATIONS
from .layers import constant_name, is_call_of
from .packed_rows import arguments
from .sparse_candidates import Candidate
from .sparse_mixtures import MIXTURE, break_even_of, split, ways_to_store
from .sparse_speed import dense_time
from .sparsity_patterns import Pattern, pattern_of
from .write_sparse import Stored, write_sparse

aten = torch.ops.aten

FEWEST_ZEROS = 0.05
"""A layer with fewer zeros than this is dense, and nothing is said about it."""


@define_pass(Guarantee.REAL)
def extract_sparsity(editor: Editor, *, recipe: Recipe) -> None:
    """Store the weights of linears as non-zeros where the recipe's `sparsity` allows and it pays."""
    made: dict[tuple[fx.Node, str, str], list[Stored]] = {}
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
        found = ways_to_store(matrix, kind, rows, form.layout, _more_passes(node))
        if not found:
            editor.refused(node, f"{kind}, {pattern.name}: {_none(node, form)}")
            continue
        best = found[0]
        dense = dense_time(kind, rows, matrix.numel(), held.numel() * held.element_size())
        if dense < best.nanoseconds * form.gain:
            editor.refused(node, _reason(kind, pattern, rows, matrix.numel(), best, dense, form))
            continue
        key = (weight, best.name, best.value)
        if key not in made:
            parts = (matrix,) if best.rest is None else split(matrix, best)
            layouts = (best.layout,) if best.rest is None else (best.layout, best.rest.layout)
            made[key] = [
                _store(editor, weight, part, kind, layout, best.value)
                for part, layout in zip(parts, layouts, strict=True)
            ]
        new = write_sparse(editor, node, made[key])
        editor.replace(node, new)
        facts = _facts(held, [part.packed for part in made[key]], pattern, rows, kind, best, dense)
        facts["candidates"] = {f"{c.name} {c.value}": c.nanoseconds / 1e3 for c in found}
        editor.applied(new, _what(matrix, pattern, rows, kind, best, dense), **facts)


def _what(matrix: Tensor, pattern: Pattern, rows: int, kind: str, best: Candidate, dense: float) -> str:
    empty = "".join(
        f", {count} empty {name}"
        for count, name in ((pattern.empty_rows, "rows"), (pattern.empty_columns, "columns"))
        if count
    )
    return (
        f"{matrix.shape[0]} x {matrix.shape[1]}, {pattern.name}{empty}: {pattern.density:.1%} are not zero, stored as "
        f"{best.name} of {best.value}, predicted {dense / best.nanoseconds:.2f} times the dense speed"
    )


def _more_passes(node: fx.Node) -> int:
    """How many operators more a mixture needs behind its two; -1: it cannot be one (`ways_to_store`)."""
    if node.target != aten.linear.default:
        given = arguments(node)
        return (
            -1
            if given["gated"]
            else int(given["activation"] != "none") * (1 + (given["residual"] is not None))
        )
    return int(is_call_of(only_user(node), *ACTIVATIONS))


def _none(node: fx.Node, form: Sparsity) -> str:
    """Why there is no way to store a matrix."""
    if form.layout != MIXTURE:
        return f"the layout {form.layout} does not hold it"
    if _more_passes(node) < 0:
        return "gated linears have no mixtures: the residual of one operator comes behind the product of both factors"
    return "it is no mixture: no layout holds a part of it, or one layout holds all of it"


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
    held: Tensor,
    packed: Sequence[PackedSparse],
    pattern: Pattern,
    rows: int,
    kind: str,
    best: Candidate,
    dense: float,
) -> dict[str, Any]:
    size, stored = held.numel() * held.element_size(), sum(part.nbytes for part in packed)
    return {
        "pattern": pattern.name,
        "density": pattern.density,
        "empty_rows": pattern.empty_rows,
        "empty_columns": pattern.empty_columns,
        "layout": best.name,
        "values": best.value,
        "stored": sum(part.density for part in packed),
        "rows": rows,
        "break_even": break_even_of(best, packed[0].n * packed[0].k, rows, kind),
        "predicted_speedup": dense / best.nanoseconds,
        "saved_microseconds": (dense - best.nanoseconds) / 1e3,
        "dense_bytes": size,
        "sparse_bytes": stored,
        "saved_bytes": size - stored,
    }


def _reason(
    kind: str, pattern: Pattern, rows: int, weights: int, best: Candidate, dense: float, form: Sparsity
) -> str:
    at = f"{rows} row{'s' if rows > 1 else ''} of activations"
    limit = break_even_of(best, weights, rows, kind)
    enough = (
        f"it pays where up to {limit:.0%} of the weights are stored"
        if limit
        else "it does not pay at any density"
    )
    return (
        f"{kind}, {pattern.name}: at a density of {pattern.density:.0%} and {at} it is predicted to run at "
        f"{dense / best.nanoseconds:.2f} times the dense speed as {best.name} of {best.value}, less than "
        f"{form.gain:g}; "
        f"{enough}"
    )


def _store(editor: Editor, weight: fx.Node, matrix: Tensor, kind: str, layout: str, values: str) -> Stored:
    chosen = matrix.bfloat16() if values == "bfloat16" else matrix
    packed = pack_sparse(chosen, layout, 4 if kind == "int4" else 8)
    parts = {"places": packed.places, "values": packed.values, "offsets": packed.offsets}
    nodes = tuple(
        editor.constant(tensor, constant_name(editor, weight, f"sparse_{part}"))
        for part, tensor in parts.items()
    )
    return Stored(matrix, packed, nodes)
