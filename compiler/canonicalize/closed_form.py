"""Index arithmetic in closed form: what a tensor holds at given coordinates, as an expression.

Models build masks from `arange`, comparisons, broadcasts, gathers and running sums. Read at the coordinates
(c0, c1, ...) each of these is a formula: `arange(n)` is c0, a gather substitutes coordinates, the difference of
`arange` is 1. So the dozens of nodes of a causal mask reduce to `c3 <= c2`, proved for every size, not tried at
one. What has no formula here (an input, a computed value) is an opaque function of its coordinates.

Coordinates are non-negative integers; a dimension of size one has the coordinate 0 only. Sizes stay symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]  # it ships no types
import torch
from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape
from .match import CASTS, RESHAPES, aten, is_call, operands, scalar

_MOST_CONSTANT_ELEMENTS = 1 << 22


def coordinate(dim: int) -> sympy.Symbol:
    """The symbol of one coordinate."""
    return sympy.Symbol(f"c{dim}", integer=True, nonnegative=True)


@dataclass
class ClosedForms:
    """The formulas of a graph's nodes, computed on demand; `opaque` maps function names to their nodes."""

    editor: Editor
    opaque: dict[str, fx.Node] = field(default_factory=dict)
    known: dict[fx.Node, Any] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Any:
        """The formula of `node` in its own coordinates (a sympy expression or boolean)."""
        if node not in self.known:
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            found = rule(self, node) if rule is not None else self._constant(node)
            self.known[node] = self._opaque(node) if found is None else self._flat(node, found)
        return self.known[node]

    def as_operand(self, operand: object, result: fx.Node) -> Any:
        """The formula of an operand (or number) in the coordinates of the result it is broadcast to."""
        if not isinstance(operand, fx.Node):
            return sympy.sympify(operand)
        shift = len(shape(result) or ()) - len(shape(operand) or ())
        return move(self.of(operand), {d: coordinate(d + shift) for d in range(len(shape(operand) or ()))})

    def _opaque(self, node: fx.Node) -> Any:
        self.opaque[node.name] = node
        at = [0 if size == 1 else coordinate(d) for d, size in enumerate(shape(node) or ())]
        element = (
            sympy.Function(node.name, integer=True)(*at) if at else sympy.Symbol(node.name, integer=True)
        )
        return sympy.Ne(element, 0) if dtype(node) == torch.bool else element

    def _flat(self, node: fx.Node, formula: Any) -> Any:
        """Coordinates of dimensions of size one are 0."""
        return move(
            formula, {d: sympy.Integer(0) for d, size in enumerate(shape(node) or ()) if _is_one(size)}
        )

    def _constant(self, node: fx.Node) -> Any:
        """A constant that is one number, `arange` along its last dimension, or a lower triangle of True."""
        held = self.editor.tensor(node)
        if held is None or held.is_floating_point() or not 0 < held.numel() <= _MOST_CONSTANT_ELEMENTS:
            return None
        first = held.flatten()[0]
        if bool((held == first).all()):
            return sympy.true if held.dtype == torch.bool and first else sympy.sympify(first.item())
        last = held.dim() - 1
        if held.dtype != torch.bool:
            counted = torch.arange(held.shape[-1], dtype=held.dtype).expand_as(held)
            return coordinate(last) if torch.equal(held, counted) else None
        if held.dim() >= 2 and torch.equal(held, torch.ones_like(held).tril()):
            return sympy.Le(coordinate(last), coordinate(last - 1))
        return None


def move(formula: Any, to: dict[int, Any]) -> Any:
    """Replace coordinates, all at once."""
    mapping = {coordinate(d): sympy.sympify(new) for d, new in to.items()}
    return formula.xreplace(mapping) if hasattr(formula, "xreplace") else formula


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _size(value: object) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _number(operand: object) -> Any:
    """A size or bound as an expression; None where it is computed otherwise."""
    if isinstance(operand, fx.Node):
        held = operand.meta.get("val")
        return held.node.expr if isinstance(held, torch.SymInt) else None
    return sympy.Integer(operand) if isinstance(operand, int) else None


def _arange(forms: ClosedForms, node: fx.Node) -> Any:
    kind = dtype(node)
    if kind is None or kind.is_floating_point:
        return None
    if is_call(node, aten.arange.default):
        return coordinate(0)
    start = _number(operands(node)[0])
    step = (
        _number(operands(node)[2])
        if is_call(node, aten.arange.start_step) and len(operands(node)) > 2
        else sympy.Integer(1)
    )
    return None if start is None or step is None else start + step * coordinate(0)


def _filled(number: object) -> Callable[[ClosedForms, fx.Node], Any]:
    def rule(forms: ClosedForms, node: fx.Node) -> Any:
        filled = argument(node, "fill_value") if number is None else number
        if not isinstance(filled, (int, float)):
            return None
        return sympy.sympify(bool(filled)) if dtype(node) == torch.bool else sympy.sympify(filled)

    return rule


def _elementwise(function: Callable[..., Any]) -> Callable[[ClosedForms, fx.Node], Any]:
    def rule(forms: ClosedForms, node: fx.Node) -> Any:
        read = [forms.as_operand(a, node) for a in operands(node)[:2]]
        kinds = [dtype(a) for a in operands(node)[:2] if isinstance(a, fx.Node)]
        if any(kind is None or kind.is_floating_point or kind == torch.bool for kind in kinds):
            return None
        if node.kwargs.get("alpha", 1) != 1 or any(_is_choice(o) for o in read):
            return None
        return function(*read)

    return rule


def _is_choice(formula: Any) -> bool:
    return isinstance(formula, sympy.Piecewise)


def _logic(function: Callable[..., Any]) -> Callable[[ClosedForms, fx.Node], Any]:
    def rule(forms: ClosedForms, node: fx.Node) -> Any:
        if any(isinstance(a, fx.Node) and dtype(a) != torch.bool for a in operands(node)):
            return None
        return function(*(forms.as_operand(a, node) for a in operands(node)[:2]))

    return rule


def _reindexed(to: Callable[[fx.Node], dict[int, Any] | None]) -> Callable[[ClosedForms, fx.Node], Any]:
    """A rule for operators that only rearrange: `to` gives the coordinates of the source in those of the result."""

    def rule(forms: ClosedForms, node: fx.Node) -> Any:
        mapping = to(node)
        source = operands(node)[0]
        return None if mapping is None or not isinstance(source, fx.Node) else move(forms.of(source), mapping)

    return rule


def _rank(node: object) -> int:
    return len(shape(node) or ()) if isinstance(node, fx.Node) else 0


def _unsqueezed(node: fx.Node) -> dict[int, Any]:
    at = int(operands(node)[1]) % _rank(node)
    return {d: coordinate(d if d < at else d + 1) for d in range(_rank(node) - 1)}


def _expanded(node: fx.Node) -> dict[int, Any]:
    shift = _rank(node) - _rank(operands(node)[0])
    return {d: coordinate(d + shift) for d in range(_rank(operands(node)[0]))}


def _permuted(node: fx.Node) -> dict[int, Any]:
    order = list(range(_rank(node)))
    if is_call(node, aten.permute.default):
        order = [int(d) % len(order) for d in operands(node)[1]]
    else:
        a, b = (int(d) % len(order) for d in operands(node)[1:3])
        order[a], order[b] = order[b], order[a]
    return {source: coordinate(result) for result, source in enumerate(order)}


def _reshaped(node: fx.Node) -> dict[int, Any] | None:
    """Only dimensions of size one may come and go."""
    source, result = (
        [(d, _size(size)) for d, size in enumerate(shape(n) or ()) if not _is_one(size)]
        for n in (operands(node)[0], node)
        if isinstance(n, fx.Node)
    )
    if [size for _, size in source] != [size for _, size in result]:
        return None
    return {a: coordinate(b) for (a, _), (b, _) in zip(source, result, strict=True)}


def _sliced(node: fx.Node) -> dict[int, Any] | None:
    dim, start, step = (argument(node, name) for name in ("dim", "start", "step"))
    first = _number(0 if start is None else start)
    if first is None or step != 1 or not first.is_nonnegative:
        return None
    dim %= _rank(node)
    return {dim: coordinate(dim) + first}


def _cast(forms: ClosedForms, node: fx.Node) -> Any:
    source = operands(node)[0]
    if not isinstance(source, fx.Node):
        return None
    formula = forms.of(source)
    if dtype(source) == dtype(node):
        return formula
    if dtype(node) == torch.bool and isinstance(formula, sympy.Number):
        return sympy.sympify(bool(formula))
    if dtype(node) == torch.bool and _is_choice(formula):
        (chosen, condition), (other, _) = formula.args
        if chosen.is_number and other.is_number:
            return sympy.ITE(condition, sympy.sympify(bool(chosen)), sympy.sympify(bool(other)))
    return None


def _choice(forms: ClosedForms, node: fx.Node) -> Any:
    condition, chosen, other = operands(node)[:3]
    numbers = [scalar(forms.editor, operand) for operand in (chosen, other)]
    if None in numbers or not isinstance(condition, fx.Node):
        return None
    values = [sympy.sympify(number) for number in numbers]
    return sympy.Piecewise((values[0], forms.as_operand(condition, node)), (values[1], True), evaluate=False)


def _gathered(forms: ClosedForms, node: fx.Node) -> Any:
    source, indices = operands(node)[0], argument(node, "indices")
    if len(indices) != _rank(source) or any(
        not isinstance(i, fx.Node) or dtype(i) == torch.bool for i in indices
    ):
        return None
    assert isinstance(source, fx.Node)
    return move(forms.of(source), {d: forms.as_operand(index, node) for d, index in enumerate(indices)})


def _repeated(node: fx.Node) -> dict[int, Any] | None:
    """Repeating a dimension of size one is broadcasting it."""
    source, shift = operands(node)[0], _rank(node) - _rank(operands(node)[0])
    counts = operands(node)[1][shift:]
    broadcast = [_is_one(size) or count == 1 for size, count in zip(shape(source) or (), counts, strict=True)]
    return {d: coordinate(d + shift) for d in range(_rank(source))} if all(broadcast) else None


def _difference(forms: ClosedForms, node: fx.Node) -> Any:
    """x[i] - x[i - 1], where a value is put in front that continues the formula backwards."""
    source, prepended = operands(node)[0], argument(node, "prepend")
    if argument(node, "n") != 1 or argument(node, "append") is not None or not isinstance(source, fx.Node):
        return None
    dim = int(argument(node, "dim")) % _rank(node)
    formula = forms.of(source)
    if prepended is None:
        return move(formula, {dim: coordinate(dim) + 1}) - formula
    before = sympy.sympify(formula).subs(coordinate(dim), -1)
    front = move(forms.of(prepended), {dim: sympy.Integer(0)})
    if (shape(prepended) or ())[dim] != 1 or sympy.expand(before - front) != 0:
        return None
    return sympy.expand(formula - sympy.sympify(formula).subs(coordinate(dim), coordinate(dim) - 1))


def _cumulated(forms: ClosedForms, node: fx.Node) -> Any:
    source = operands(node)[0]
    nothing = isinstance(source, fx.Node) and forms.of(source) in (sympy.false, sympy.Integer(0))
    return sympy.Integer(0) if nothing else None


def _triangle(lower: bool) -> Callable[[ClosedForms, fx.Node], Any]:
    def rule(forms: ClosedForms, node: fx.Node) -> Any:
        source = operands(node)[0]
        if dtype(node) != torch.bool or not isinstance(source, fx.Node):
            return None
        row, column = coordinate(_rank(node) - 2), coordinate(_rank(node) - 1)
        offset = sympy.Integer(argument(node, "diagonal"))
        inside = sympy.Le(column, row + offset) if lower else sympy.Ge(column, row + offset)
        return sympy.And(forms.of(source), inside)

    return rule


def _both(*targets: object, rule: Callable[[ClosedForms, fx.Node], Any]) -> dict[object, Any]:
    return dict.fromkeys(targets, rule)


_RULES: dict[object, Callable[[ClosedForms, fx.Node], Any]] = {
    **_both(aten.arange.default, aten.arange.start, aten.arange.start_step, rule=_arange),
    **_both(aten.ones.default, aten.new_ones.default, aten.ones_like.default, rule=_filled(1)),
    **_both(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default, rule=_filled(0)),
    **_both(aten.full.default, aten.full_like.default, aten.new_full.default, rule=_filled(None)),
    **_both(aten.add.Tensor, aten.add.Scalar, rule=_elementwise(lambda a, b: a + b)),
    **_both(aten.sub.Tensor, aten.sub.Scalar, rule=_elementwise(lambda a, b: a - b)),
    **_both(aten.mul.Tensor, aten.mul.Scalar, rule=_elementwise(lambda a, b: a * b)),
    **_both(aten.le.Tensor, aten.le.Scalar, rule=_elementwise(sympy.Le)),
    **_both(aten.lt.Tensor, aten.lt.Scalar, rule=_elementwise(sympy.Lt)),
    **_both(aten.ge.Tensor, aten.ge.Scalar, rule=_elementwise(sympy.Ge)),
    **_both(aten.gt.Tensor, aten.gt.Scalar, rule=_elementwise(sympy.Gt)),
    **_both(aten.eq.Tensor, aten.eq.Scalar, rule=_elementwise(sympy.Eq)),
    **_both(aten.ne.Tensor, aten.ne.Scalar, rule=_elementwise(sympy.Ne)),
    **_both(aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, rule=_logic(sympy.And)),
    **_both(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, rule=_logic(sympy.Or)),
    **_both(aten.bitwise_not.default, aten.logical_not.default, rule=_logic(sympy.Not)),
    **_both(*RESHAPES, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, rule=_reindexed(_reshaped)),
    **_both(aten.transpose.int, aten.permute.default, rule=_reindexed(_permuted)),
    **_both(*CASTS, rule=_cast),
    **_both(aten.where.ScalarOther, aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, rule=_choice),
    aten.unsqueeze.default: _reindexed(_unsqueezed),
    aten.expand.default: _reindexed(_expanded),
    aten.repeat.default: _reindexed(_repeated),
    aten.slice.Tensor: _reindexed(_sliced),
    aten.index.Tensor: _gathered,
    aten.diff.default: _difference,
    aten.cumsum.default: _cumulated,
    aten.tril.default: _triangle(lower=True),
    aten.triu.default: _triangle(lower=False),
}


def at_most_zero(relation: Any) -> Any:
    """d where the relation of integers says d <= 0; None for every other formula."""
    if isinstance(relation, sympy.Le):
        return sympy.expand(relation.lhs - relation.rhs)
    if isinstance(relation, sympy.Lt):
        return sympy.expand(relation.lhs - relation.rhs + 1)
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        return at_most_zero(relation.reversed)
    return None


def conjuncts(formula: Any) -> Sequence[Any]:
    """The formulas whose conjunction this is."""
    return formula.args if isinstance(formula, sympy.And) else (formula,)
