"""Scales and zero points that a graph computes from the rows of a value, as functions of each row's range.

    s(x) = f(min x, max x)   f made of sums, products, minima, maxima, clamps, roundings and choices

The graph between the reductions (`amin`, `amax`, of x or of |x|) and a scale is evaluated in float64 for ranges
[low, high] in all directions. However they are spelled, scales are piecewise linear in (low, high) but for guards
against small rows, so that this tells which of two quantizers takes the wider step, and whether they are one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import CASTS, RESHAPES, aten, dimensions, equal_sizes, is_call, operands
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, shape
from .rounding_chains import Scale, Term

GRANULARITIES = ("token", "sample", "tensor")
"""What shares a range, from fine to coarse."""

_NUMBERS: dict[Any, Callable[..., Tensor]] = {
    aten.abs.default: torch.abs,
    aten.neg.default: torch.neg,
    aten.reciprocal.default: torch.reciprocal,
    aten.round.default: torch.round,
    aten.floor.default: torch.floor,
    aten.ceil.default: torch.ceil,
    aten.log2.default: torch.log2,
    aten.exp2.default: torch.exp2,
    aten.add.Tensor: torch.add,
    aten.add.Scalar: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.sub.Scalar: torch.sub,
    aten.rsub.Scalar: torch.rsub,
    aten.mul.Tensor: torch.mul,
    aten.mul.Scalar: torch.mul,
    aten.div.Tensor: torch.div,
    aten.div.Scalar: torch.div,
    aten.minimum.default: torch.minimum,
    aten.maximum.default: torch.maximum,
    aten.clamp.default: torch.clamp,
    aten.clamp.Tensor: torch.clamp,
    aten.clamp_min.default: torch.clamp_min,
    aten.clamp_max.default: torch.clamp_max,
    aten.where.self: torch.where,
    aten.where.ScalarOther: torch.where,
    aten.gt.Scalar: torch.gt,
    aten.gt.Tensor: torch.gt,
    aten.ge.Scalar: torch.ge,
    aten.lt.Scalar: torch.lt,
    aten.lt.Tensor: torch.lt,
    aten.le.Scalar: torch.le,
    aten.eq.Scalar: torch.eq,
}
_FILLED = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
_PEELED = (
    *RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.clone.default,
)  # fmt: skip


class UnknownFormulaError(Exception):
    """A value is no function of the ranges of rows; the message says what it is computed with."""


def probes(count: int = 720, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """Ranges (low, high) with low <= high in every direction, at about this size."""
    # Half a turn from low = high > 0 over low < 0 < high to low = high < 0, off its ends.
    angles = math.pi / 4 + math.pi * (torch.arange(count, dtype=torch.float64) + 0.437) / count
    return size * angles.cos().minimum(angles.sin()), size * angles.cos().maximum(angles.sin())


class RowFormula:
    """Values of nodes for given ranges of the rows of x. `granularity` says what was reduced."""

    def __init__(self, editor: Editor, x: fx.Node, low: Tensor, high: Tensor) -> None:
        self.editor, self.x, self.low, self.high = editor, x, low, high
        self.reductions: set[str] = set()
        self._known: dict[fx.Node, Tensor] = {}

    @property
    def granularity(self) -> str:
        """What shares one range. Raises UnknownFormulaError where it is not one thing."""
        if len(self.reductions) != 1:
            raise UnknownFormulaError("its scale does not follow from one kind of range of its rows")
        return next(iter(self.reductions))

    def scale(self, scale: Scale) -> Tensor:
        """The scale for each range."""
        result = torch.full_like(self.low, scale.coefficient)
        for node, power in scale.powers:
            result = result * self.of(node) ** power
        return result

    def term(self, term: Term) -> Tensor:
        """The term for each range."""
        result = torch.full_like(self.low, term.number)
        for node, coefficient in term.nodes:
            result = result + coefficient * self.of(node)
        return result

    def of(self, node: Any) -> Tensor:
        """A node or number for each range."""
        if not isinstance(node, fx.Node):
            return node  # a number, None, or a keyword
        if node not in self._known:
            self._known[node] = self._evaluate(node)
        return self._known[node]

    def _evaluate(self, node: fx.Node) -> Tensor:
        held = self.editor.tensor(node)
        if held is not None and held.numel() == 1:
            return torch.full_like(self.low, float(held))
        reduced = self._reduced(node)
        if reduced is not None:
            return reduced
        if node.target in _FILLED:
            return torch.full_like(self.low, _FILLED[node.target])
        if is_call(node, aten.full_like.default, aten.full.default):
            return torch.full_like(self.low, float(operands(node)[1]))
        if is_call(node, *_PEELED):
            return self.of(operands(node)[0])
        if is_call(node, *CASTS):
            source = self.of(operands(node)[0])
            kind = dtype(node)
            return source if kind is not None and kind.is_floating_point else source.trunc()
        if node.op == "call_function" and node.target in _NUMBERS:
            args = [self.of(a) for a in node.args]
            return _NUMBERS[node.target](*args, **{k: self.of(v) for k, v in node.kwargs.items()})
        called = node.target if node.op == "call_function" else f"the {node.op} {node.name}"
        raise UnknownFormulaError(
            f"its scale is computed with {called}, not from the range of its rows alone"
        )

    def _reduced(self, node: fx.Node) -> Tensor | None:
        """The value of a reduction of x or |x|, or None for other nodes."""
        call, largest = node, True
        if is_call(node, operator.getitem):
            call = operands(node)[0]
            if is_call(call, aten.aminmax.default):
                largest = operands(node)[1] == 1
            elif is_call(call, aten.max.dim, aten.min.dim) and operands(node)[1] == 0:
                largest = call.target == aten.max.dim
            else:
                return None
        elif is_call(node, aten.amin.default, aten.min.default):
            largest = False
        elif not is_call(node, aten.amax.default, aten.max.default):
            return None
        source = operands(call)[0]
        self.reductions.add(self._reduction(call, source))
        absolute = is_call(source, aten.abs.default)
        inner = _rows_of(operands(source)[0] if absolute else source)
        if inner is not _rows_of(self.x):
            raise UnknownFormulaError("its scale comes from another value than what is rounded")
        if absolute:
            both = torch.stack((self.low.abs(), self.high.abs()))
            # |x| is smallest somewhere in between, which its range does not say.
            return (
                both.amax(0)
                if largest
                else _raise("its scale is computed from the smallest magnitude of a row")
            )
        return self.high if largest else self.low

    def _reduction(self, call: fx.Node, source: fx.Node) -> str:
        """What a reduction runs over: token, sample or tensor."""
        sizes, whole = shape(source) or (), shape(self.x) or ()
        given = argument(call, "dim") if call.target not in (aten.max.default, aten.min.default) else None
        dims = (
            set(range(len(sizes))) if given is None or given == [] else set(dimensions(source, given) or ())
        )
        inside = operands(source)[0] if is_call(source, aten.abs.default) else source
        same_last = bool(sizes) and bool(whole) and equal_sizes(sizes[-1], whole[-1])
        if dims == set(range(len(sizes))):
            return "token" if all(isinstance(n, int) and n == 1 for n in whole[:-1]) else "tensor"
        if dims == {len(sizes) - 1} and same_last:
            return "token"
        if inside is self.x and dims == set(range(1, len(sizes))):
            return "sample"
        raise UnknownFormulaError(
            f"its scale is for dimensions {sorted(dims)} of {list(sizes)}, and kernels take one a token or sample"
        )


def _rows_of(node: Any) -> Any:
    """The value whose leading dimensions may have been merged or split."""
    while is_call(node, *RESHAPES):
        source = operands(node)[0]
        inner, outer = shape(source), shape(node)
        if not inner or not outer or not equal_sizes(inner[-1], outer[-1]):
            return node
        node = source
    return node


def _raise(reason: str) -> Tensor:
    raise UnknownFormulaError(reason)
