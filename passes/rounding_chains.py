"""Simulated rounding in a graph, read up to how it is spelled: y = (clamp(round(x / s) + z, lo, hi) - z) s.

Behind a `round` comes a chain of sums, clamps and products with values that are numbers or one number for each row
(their last size is 1). With q = round(x / s) everything along it is `clamp(q, low, high) + offset`: a sum moves the
offset, a clamp at c behind the offset o clamps q at c - o. The chain is a rounding where the offset is 0 again and the
products behind undo those in front. So z may be absent, stand inside of the rounding (where it is whole), in front of
or behind the clamp; scales may be numbers, constants or computed values, multiplied, divided by, or their reciprocals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..compiler.canonicalize.integer_values import Bounds, clamp_bounds
from ..compiler.canonicalize.match import (
    ADDITIONS,
    CASTS,
    DIVISIONS,
    MULTIPLICATIONS,
    RESHAPES,
    SUBTRACTIONS,
    aten,
    is_call,
    is_float,
    operands,
    scalar,
    uncast,
)
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, shape

_FILLED = (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
_PEELED = (*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default)
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
_SAME = 1e-6
"""Relative difference of a scale and the inverse of its rounded reciprocal."""


@dataclass(frozen=True)
class Term:
    """number + sum of coefficient * node."""

    number: float = 0.0
    nodes: tuple[tuple[fx.Node, float], ...] = ()

    def plus(self, other: Term, sign: float = 1.0) -> Term:
        """The sum, or with sign -1 the difference."""
        held = dict(self.nodes)
        for node, coefficient in other.nodes:
            held[node] = held.get(node, 0.0) + sign * coefficient
        left = tuple((node, c) for node, c in held.items() if c)
        return Term(self.number + sign * other.number, left)

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 whatever the nodes are."""
        return not self.number and not self.nodes


@dataclass(frozen=True)
class Scale:
    """coefficient * product of node ** power."""

    coefficient: float = 1.0
    powers: tuple[tuple[fx.Node, int], ...] = ()

    def times(self, other: Scale, sign: int = 1) -> Scale:
        """The product, or with sign -1 the quotient."""
        held = dict(self.powers)
        for node, power in other.powers:
            held[node] = held.get(node, 0) + sign * power
        factor = self.coefficient * other.coefficient if sign > 0 else self.coefficient / other.coefficient
        return Scale(factor, tuple((node, p) for node, p in held.items() if p))

    @property
    def is_one(self) -> bool:
        """Whether it is 1 up to the rounding of a reciprocal."""
        return not self.powers and abs(self.coefficient - 1.0) <= _SAME


@dataclass(frozen=True)
class Rounding:
    """One simulated rounding: `result` is (clamp(round(x / scale), low, high)) scale. None: not clamped there.

    first: the call that reads x.
    """

    x: fx.Node
    first: fx.Node
    scale: Scale
    low: Term | None
    high: Term | None
    result: fx.Node


@dataclass
class _State:
    """What a chain is so far: (clamp(q, low, high) + offset) * scale."""

    offset: Term = field(default_factory=Term)
    low: Term | None = None
    high: Term | None = None
    scale: Scale = field(default_factory=Scale)
    scaled: bool = False


def roundings(editor: Editor) -> Iterator[tuple[fx.Node, Rounding | str]]:
    """(round, what it is part of) for each `round` that looks like one, or the reason why it is none."""
    reader = _Reader(editor)
    for node in editor.calls(aten.round.default):
        found = reader.read(node)
        if found is not None:
            yield node, found


class _Reader:
    def __init__(self, editor: Editor) -> None:
        self.editor, self.bounds = editor, Bounds(editor)

    def read(self, node: fx.Node) -> Rounding | str | None:
        inside = uncast(operands(node)[0])
        starts = [(inside, Term())]
        if is_call(inside, *ADDITIONS, *SUBTRACTIONS) and argument(inside, "alpha") == 1:
            first, second = operands(inside)[:2]
            sign = 1.0 if is_call(inside, *ADDITIONS) else -1.0
            if self.is_for_rows(second) and self.bounds.is_whole(second):
                starts.append((first, Term().plus(self.term(second), sign)))
        reason = None
        for result, state in self._behind(node, _State()):
            for start, offset in starts:
                whole = state.offset.plus(offset)
                if not whole.is_zero:
                    continue
                low = None if state.low is None else state.low.plus(offset, -1.0)
                high = None if state.high is None else state.high.plus(offset, -1.0)
                first = node if start is operands(node)[0] else operands(node)[0]
                for x, front in self._in_front(start):
                    if front.times(state.scale).is_one:
                        return Rounding(x, first, state.scale, low, high, result)
                    first = x
                if low is not None or high is not None:
                    reason = "what its codes are multiplied with is not the inverse of what is in front of the rounding"
        return reason

    def _in_front(self, node: Any) -> Iterator[tuple[fx.Node, Scale]]:
        """(x, s) with node = x s, shortest first: what is a scale and what a part of x is known behind only."""
        scale = Scale()
        while isinstance(node, fx.Node):
            if not is_float(node):
                return
            yield node, scale
            if is_call(node, *CASTS):
                node = operands(node)[0]
                continue
            if not is_call(node, *MULTIPLICATIONS, *DIVISIONS):
                return
            first, second = operands(node)[:2]
            if is_call(node, *DIVISIONS):
                if not self.is_for_rows(second):
                    return
                scale, node = scale.times(self.scale(second), -1), first
            elif self.is_for_rows(second):
                scale, node = scale.times(self.scale(second)), first
            elif self.is_for_rows(first):
                scale, node = scale.times(self.scale(first)), second
            else:
                return

    def _behind(self, node: fx.Node, state: _State) -> Iterator[tuple[fx.Node, _State]]:
        """Results of chains behind a node: those behind a product or division, with an offset of 0."""
        for user in list(node.users):
            after = self._through(user, node, state)
            if after is None:
                continue
            if after.scaled and dtype(user) == torch.float32:
                yield user, after
            yield from self._behind(user, after)

    def _through(self, user: fx.Node, value: fx.Node, state: _State) -> _State | None:
        if is_call(user, *CASTS):
            return state if is_float(user) else None
        if state.scaled and not is_call(user, *MULTIPLICATIONS, *DIVISIONS):
            return None
        if is_call(user, *_CLAMPS):
            return self._clamped(state, *clamp_bounds(user)) if operands(user)[0] is value else None
        if not is_call(
            user,
            *ADDITIONS,
            *SUBTRACTIONS,
            *MULTIPLICATIONS,
            *DIVISIONS,
            aten.minimum.default,
            aten.maximum.default,
        ):
            return None
        first, second = operands(user)[:2]
        other = second if first is value else first
        if not self.is_for_rows(other):
            return None
        if is_call(user, aten.maximum.default):
            return self._clamped(state, other, None)
        if is_call(user, aten.minimum.default):
            return self._clamped(state, None, other)
        if is_call(user, *ADDITIONS, *SUBTRACTIONS):
            sign = 1.0 if is_call(user, *ADDITIONS) else -1.0
            if argument(user, "alpha") != 1 or (sign < 0 and first is not value):
                return None
            return _State(state.offset.plus(self.term(other), sign), state.low, state.high)
        if is_call(user, *DIVISIONS) and first is not value:
            return None
        factor = state.scale.times(self.scale(other), 1 if is_call(user, *MULTIPLICATIONS) else -1)
        return _State(state.offset, state.low, state.high, factor, scaled=True)

    def _clamped(self, state: _State, low: Any, high: Any) -> _State | None:
        """Clamps behind an offset are clamps of q; a second one on the same side only where both are numbers."""
        bounds = []
        for given, held, tighter in ((low, state.low, max), (high, state.high, min)):
            if given is None:
                bounds.append(held)
                continue
            new = self.term(given).plus(state.offset, -1.0)
            if held is not None:
                if held.nodes or new.nodes:
                    return None
                new = Term(tighter(held.number, new.number))
            bounds.append(new)
        return _State(state.offset, bounds[0], bounds[1], state.scale, state.scaled)

    def is_for_rows(self, operand: object) -> bool:
        """Whether an operand is a number, or one number for each row."""
        if scalar(self.editor, operand) is not None:
            return True
        sizes = shape(operand) if isinstance(operand, fx.Node) else None
        return sizes is not None and (not sizes or sizes[-1] == 1)

    def number(self, operand: object) -> float | None:
        """The number that an operand is everywhere."""
        found = scalar(self.editor, operand)
        if found is None and is_call(operand, *_FILLED):
            if is_call(operand, aten.full_like.default):
                return scalar(self.editor, operands(operand)[1])
            return 0.0 if is_call(operand, aten.zeros_like.default) else 1.0
        return found

    def term(self, operand: Any) -> Term:
        """An operand as a term."""
        operand = _peeled(operand)
        number = self.number(operand)
        if number is not None:
            return Term(number)
        if is_call(operand, aten.neg.default):
            return Term().plus(self.term(operands(operand)[0]), -1.0)
        return Term(0.0, ((operand, 1.0),))

    def scale(self, operand: Any) -> Scale:
        """An operand as a product of numbers and nodes."""
        operand = _peeled(operand)
        number = self.number(operand)
        if number:
            return Scale(number)
        if is_call(operand, aten.reciprocal.default):
            return Scale().times(self.scale(operands(operand)[0]), -1)
        if is_call(operand, *MULTIPLICATIONS, *DIVISIONS):
            first, second = (self.scale(o) for o in operands(operand)[:2])
            return first.times(second, 1 if is_call(operand, *MULTIPLICATIONS) else -1)
        return Scale(1.0, ((operand, 1),))


def _peeled(operand: Any) -> Any:
    """The value behind views and casts between floats, which hold the same numbers."""
    while is_call(operand, *_PEELED) or uncast(operand) is not operand:
        operand = operands(operand)[0]
    return operand
