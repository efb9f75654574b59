"""Every einsum of two factors becomes a linear or a product of matrices, between permutations and reshapes.

    einsum('bsgc,hdgc->bshd', x, W)   →  reshape(linear(reshape(x, [b, s, g c]), W as [h d, g c]), [b, s, h, d])
    einsum('bqhd,bkhd->bhqk', q, k)   →  matmul(permute(q, b h q d), permute(k, b h d k))
    einsum('bij->bji', x)             →  permute(x)

Letters fall into four sets: those of both factors and the result (batch), those of both and not of the result
(contracted), and those of one factor and the result. A linear takes the contracted ones of the constant factor as its
columns and the others as its rows; a product of matrices has one dimension for each set but the batch.

A constant that is a view of a stored matrix in the linear's own order stays that matrix, so that tied weights stay one.

Side conditions: one or two factors; no letter twice in one factor (a diagonal), none that only one factor has and
the result lacks (a sum), none whose sizes differ (a broadcast). Exactness: real (another order of one sum).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..editor import Editor
from ..graph import argument, shape
from ..passes import Guarantee, define_pass
from .match import aten, constant_matrix, equal_sizes, is_constant


@define_pass(Guarantee.REAL)
def canonicalize_einsum(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(aten.einsum.default):
        factors = [f for f in argument(node, "tensors") if isinstance(f, fx.Node)]
        read = _letters(argument(node, "equation"), [len(shape(f) or ()) for f in factors])
        reason = _reason(factors, *read) if isinstance(read, tuple) else read
        if reason is not None or isinstance(read, str):
            editor.refused(node, f"einsum {argument(node, 'equation')}: {reason}")
            continue
        inputs, output = read
        if len(factors) == 1:
            new = _permuted(editor, node, factors[0], inputs[0], output)
            editor.applied(node, "an einsum of one factor is a permutation")
        else:
            new = _product(editor, node, factors, inputs, output)
        editor.replace(node, new)


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | str:
    """The letters of each factor and of the result; dimensions behind an ellipsis get letters of their own."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return "its equation and its factors differ in number"
    spare = [c for c in map(chr, range(0x3B1, 0x3CA)) if c not in text]
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    hidden = "".join(spare[: max(widths)])
    inputs = [
        term.replace("...", hidden[len(hidden) - width :]) for term, width in zip(terms, widths, strict=True)
    ]
    if not arrow:
        once = [c for c in dict.fromkeys("".join(terms).replace(".", "")) if left.count(c) == 1]
        right = hidden + "".join(sorted(once))
    return inputs, right.replace("...", hidden)


def _reason(factors: Sequence[fx.Node], inputs: Sequence[str], output: str) -> str | None:
    """Why this einsum is neither a permutation nor one product."""
    if len(factors) > 2:
        return "it has more than two factors"
    if any(len(set(term)) != len(term) for term in (*inputs, output)):
        return "a letter occurs twice in one factor: a diagonal"
    sizes: dict[str, Any] = {}
    for factor, term in zip(factors, inputs, strict=True):
        for letter, size in zip(term, shape(factor) or (), strict=True):
            if not equal_sizes(sizes.setdefault(letter, size), size):
                return f"the sizes of {letter} differ: a broadcast"
    alone = [c for term in inputs for c in term if c not in output and sum(c in t for t in inputs) == 1]
    if alone:
        return f"{alone[0]} is summed in one factor"
    if len(factors) == 2 and not (set(inputs[0]) & set(inputs[1])) - set(output):
        return "nothing is contracted"
    return None


def _permuted(editor: Editor, node: fx.Node, x: fx.Node, given: str, wanted: str) -> fx.Node:
    order = [given.index(c) for c in wanted]
    if order == list(range(len(order))):
        return x
    return editor.call(aten.permute.default, x, order, like=node)


def _sizes(editor: Editor, node: fx.Node, x: fx.Node, term: str, letters: str) -> list[Any]:
    """The sizes of letters, symbolic ones as nodes."""
    found = []
    for letter in letters:
        dim = term.index(letter)
        size = (shape(x) or ())[dim]
        found.append(size if isinstance(size, int) else editor.call(aten.sym_size.int, x, dim, like=node))
    return found


def _merged(editor: Editor, node: fx.Node, sizes: Sequence[Any]) -> Any:
    """The size of dimensions that become one."""
    total: Any = 1
    for size in sizes:
        if isinstance(size, int) and isinstance(total, int):
            total *= size
        elif total == 1:
            total = size
        else:
            total = editor.call(operator.mul, total, size, like=node)
    return total


def _matrix(editor: Editor, node: fx.Node, term: str, rows: str, columns: str) -> fx.Node | None:
    """A constant as `[rows, columns]`."""
    order = [term.index(c) for c in rows + columns]
    height = math.prod(size for at, size in enumerate(shape(node) or ()) if term[at] in rows)
    return constant_matrix(editor, node, lambda held: held.permute(order).reshape(height, -1))


def _product(
    editor: Editor, node: fx.Node, factors: Sequence[fx.Node], inputs: Sequence[str], output: str
) -> fx.Node:
    (a, b), (left, right) = factors, inputs
    both = [c for c in output if c in left and c in right]
    if not both and not is_constant(editor, b) and is_constant(editor, a):
        a, b, left, right = b, a, right, left
    batch = "".join(both)
    contracted = "".join(c for c in left if c in right and c not in output)
    mine = "".join(c for c in left if c not in right)
    theirs = "".join(c for c in right if c not in left)
    columns, rows = (_sizes(editor, node, a, left, contracted), _sizes(editor, node, b, right, theirs))
    outer = _sizes(editor, node, a, left, batch + mine)
    weight = _matrix(editor, b, right, theirs, contracted) if not batch and contracted else None
    if weight is not None:
        x = _permuted(editor, node, a, left, mine + contracted)
        if len(contracted) != 1:
            x = editor.call(aten.reshape.default, x, [*outer, math.prod(columns)], like=node)
        new = editor.call(aten.linear.default, x, weight, like=node)
        editor.applied(node, f"einsum {argument(node, 'equation')} with a constant is a linear")
    else:
        heads = outer[: len(batch)]
        x = _permuted(editor, node, a, left, batch + mine + contracted)
        if len(mine) != 1 or len(contracted) != 1:
            sizes = [*heads, _merged(editor, node, outer[len(batch) :]), _merged(editor, node, columns)]
            x = editor.call(aten.reshape.default, x, sizes, like=node)
        y = _permuted(editor, node, b, right, batch + contracted + theirs)
        if len(theirs) != 1 or len(contracted) != 1:
            sizes = [*heads, _merged(editor, node, columns), _merged(editor, node, rows)]
            y = editor.call(aten.reshape.default, y, sizes, like=node)
        new = editor.call(aten.matmul.default, x, y, like=node)
        editor.applied(node, f"einsum {argument(node, 'equation')} is a product of matrices")
    if len(theirs) != 1 or (weight is None and len(mine) != 1):
        new = editor.call(aten.reshape.default, new, [*outer, *rows], like=node)
    return _permuted(editor, node, new, batch + mine + theirs, output)
