"""Integers that floats were rounded to are computed as floats.

    float(int8(v))                 → v               v whole, within the range of int8
    float(int8(v) - int8(z))       → v - z           no intermediate leaves the range of its type
    float(_int_mm(uint8(u), W))    → mm(u, float(W))
    v + int8(z)                    → v + z

Quantizers that compute with integers and those that simulate it say the same numbers; this is the latter's
spelling, which linears, folds and `extract_rounding` read. What is whole and within which bounds follows from the
graph: rounding, clamps, and sums and products of such values (`Bounds`).

Side conditions: a float was cast to an integer somewhere before (positions and masks stay integers); each cast and each
result is within the range of its integer type, so that nothing wraps. NaN, which no integer holds, passes. Exactness:
real (bitwise while sums stay below 2^24).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..editor import Editor
from ..graph import argument, dtype, shape
from ..passes import Guarantee, define_pass
from .match import (
    ADDITIONS,
    CASTS,
    DIVISIONS,
    MULTIPLICATIONS,
    SUBTRACTIONS,
    VIEWS,
    aten,
    is_call,
    is_float,
    operands,
)

_ROUNDINGS = (aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default)
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.relu.default)
_EXTREMES = (aten.minimum.default, aten.maximum.default)
_FILLED = (aten.full_like.default, aten.full.default, aten.scalar_tensor.default)
_MOVES = (*VIEWS, aten.slice.Tensor, aten.expand.default, aten.clone.default, aten.select.int)
_PRODUCTS = (aten._int_mm.default, aten.mm.default)
_READ = {
    *_MOVES, *CASTS, aten.neg.default, *_ROUNDINGS, *_CLAMPS, *ADDITIONS, *SUBTRACTIONS, aten.rsub.Scalar,
    *MULTIPLICATIONS, *_EXTREMES, aten.where.self, *_PRODUCTS, *_FILLED, aten.zeros_like.default,
}  # fmt: skip
"""Operators whose bounds follow from those of their operands."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Range = tuple[float, float, bool]
"""Least and largest value, and whether all are whole."""


class Bounds:
    """What is known of a node's values."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self._known: dict[fx.Node, Range] = {}

    def of(self, operand: object) -> Range:
        """Least value, largest value, whole or not, of a node or number."""
        if isinstance(operand, (int, float)):
            return float(operand), float(operand), float(operand).is_integer()
        if not isinstance(operand, fx.Node):
            return -math.inf, math.inf, False
        waiting = [operand]
        while waiting:  # sums of residuals are as long as the model is deep
            node = waiting[-1]
            if node in self._known:
                waiting.pop()
                continue
            sources = node.all_input_nodes if node.target in _READ else ()
            unknown = [source for source in sources if source not in self._known]
            if not unknown:
                self._known[node] = self._typed(node, self._read(node))
            waiting.extend(unknown)
        return self._known[operand]

    def is_whole(self, operand: object) -> bool:
        """Whether all values are whole numbers."""
        return self.of(operand)[2]

    def _typed(self, node: fx.Node, found: Range) -> Range:
        kind = dtype(node)
        if kind not in _INTEGERS:
            return found
        low, high = _integers(kind)
        inside = low <= found[0] and found[1] <= high
        return (found[0], found[1], True) if inside else (low, high, True)

    def _read(self, node: fx.Node) -> Range:
        held = self.editor.tensor(node)
        if held is not None and held.numel() and held.dtype in (*_FLOATS, *_INTEGERS):
            numbers = held.detach().int() if held.dtype == torch.bool else held.detach()
            least, most = torch.aminmax(numbers)
            whole = not numbers.is_floating_point() or torch.equal(numbers, numbers.round())
            return float(least), float(most), whole
        if node.op != "call_function" or not node.args:
            return -math.inf, math.inf, False
        first = operands(node)[0]
        if is_call(node, *_MOVES, *CASTS, aten.neg.default, *_ROUNDINGS, *_CLAMPS):
            return self._of_one(node, *self.of(first))
        if is_call(node, aten.zeros_like.default):
            return 0.0, 0.0, True
        if is_call(node, *_FILLED):
            return self.of(first if node.target == aten.scalar_tensor.default else operands(node)[1])
        if is_call(node, *ADDITIONS, *SUBTRACTIONS, aten.rsub.Scalar, *MULTIPLICATIONS, *_EXTREMES):
            return self._of_two(node, self.of(first), self.of(operands(node)[1]))
        if is_call(node, aten.where.self):
            a, b = self.of(operands(node)[1]), self.of(operands(node)[2])
            return min(a[0], b[0]), max(a[1], b[1]), a[2] and b[2]
        if is_call(node, *_PRODUCTS):
            return self._of_product(node)
        return -math.inf, math.inf, False

    def _of_one(self, node: fx.Node, low: float, high: float, whole: bool) -> Range:
        if is_call(node, *_ROUNDINGS):
            return _floor(low), _ceil(high), True
        if is_call(node, aten.neg.default):
            return -high, -low, whole
        if is_call(node, *_CLAMPS):
            least, most = clamp_bounds(node)
            a, b = self.of(-math.inf if least is None else least), self.of(math.inf if most is None else most)
            whole = whole and (least is None or a[2]) and (most is None or b[2])
            return min(max(low, a[0]), b[1]), min(max(high, a[1]), b[1]), whole
        if is_call(node, *CASTS) and not is_float(node) and not whole:
            return (
                math.trunc(low) if math.isfinite(low) else low,
                math.trunc(high) if math.isfinite(high) else high,
                True,
            )
        return low, high, whole

    def _of_two(self, node: fx.Node, a: Range, b: Range) -> Range:
        whole = a[2] and b[2]
        if is_call(node, aten.minimum.default):
            return min(a[0], b[0]), min(a[1], b[1]), whole
        if is_call(node, aten.maximum.default):
            return max(a[0], b[0]), max(a[1], b[1]), whole
        if is_call(node, *MULTIPLICATIONS):
            return (*_products(a, b), whole)
        factor = argument(node, "alpha")
        if not isinstance(factor, (int, float)):
            return -math.inf, math.inf, False
        if is_call(node, aten.rsub.Scalar):
            a, b = b, a
        scaled = _products(b, (factor, factor, True))
        if not is_call(node, *ADDITIONS):
            scaled = -scaled[1], -scaled[0]
        return a[0] + scaled[0], a[1] + scaled[1], whole and float(factor).is_integer()

    def _of_product(self, node: fx.Node) -> Range:
        left, right = operands(node)[:2]
        count = (shape(left) or (None,))[-1]
        a, b = self.of(left), self.of(right)
        if not isinstance(count, int):
            return -math.inf, math.inf, a[2] and b[2]
        low, high = _products(a, b)
        return low * count, high * count, a[2] and b[2]


@define_pass(Guarantee.REAL)
def canonicalize_integer_values(editor: Editor) -> None:
    """See the module."""
    floats = _Floats(editor)
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node._erased or not is_float(node):
            continue
        if not is_call(
            node, *CASTS, *ADDITIONS, *SUBTRACTIONS, aten.rsub.Scalar, *MULTIPLICATIONS, *DIVISIONS
        ):
            continue
        for source in list(node.all_input_nodes):
            if is_float(source) or not floats.was_rounded(source):
                continue
            kind = dtype(node)
            assert kind is not None
            reason = floats.reason_against(source, kind)
            if reason is not None:
                editor.refused(node, reason)
                continue
            new = floats.of(source, kind, node)
            editor.applied(
                node, f"{dtype(source)} of rounded floats are computed as {kind}".replace("torch.", "")
            )
            if is_call(node, *CASTS):
                editor.replace(node, new)
            else:
                node.replace_input_with(source, new)
                if not source.users and not source._erased:
                    editor.erase(source)


class _Floats:
    """Integer nodes as floats with the same values."""

    def __init__(self, editor: Editor) -> None:
        self.editor, self.bounds = editor, Bounds(editor)
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._rounded: dict[fx.Node, bool] = {}

    def was_rounded(self, node: fx.Node) -> bool:
        """Whether an integer comes of floats."""
        if node not in self._rounded:
            inner = node.op == "call_function" and not is_float(node)
            cast = is_call(node, *CASTS) and is_float(operands(node)[0])
            self._rounded[node] = cast or (inner and any(map(self.was_rounded, _sources(node))))
        return self._rounded[node]

    def reason_against(self, node: fx.Node, kind: torch.dtype) -> str | None:
        """Why an integer cannot be computed as a float of this type, or None."""
        low, high, _ = self.bounds.of(node)
        rounded = max(-low, high) > 2 / torch.finfo(kind).eps
        inexact = f"{node.name} is in [{low:g}, {high:g}], where not all whole numbers are {kind}"
        if self.editor.tensor(node) is not None:
            return inexact if rounded else None
        if is_call(node, *CASTS):
            source = operands(node)[0]
            low, high, whole = self.bounds.of(source)
            least, most = _integers(dtype(node))
            if not whole:
                return f"{node.name} cuts off fractions, as its source is not rounded before"
            if low < least or high > most:
                return f"{node.name} may wrap: its source is in [{low:g}, {high:g}]"
            return None if is_float(source) else self.reason_against(source, kind)
        if not is_call(node, *_MOVES, *_CLAMPS, *ADDITIONS, *SUBTRACTIONS, *MULTIPLICATIONS, *_PRODUCTS,
                       aten.rsub.Scalar, aten.neg.default, *_EXTREMES):  # fmt: skip
            return f"{node.target} on integers has no spelling in floats here"
        low, high, _ = self.bounds._read(node)
        least, most = _integers(dtype(node))
        if low < least or high > most:
            return f"{node.name} may wrap: it is in [{low:g}, {high:g}]"
        if rounded and kind not in (torch.float32, torch.float64):
            return inexact
        reasons = (self.reason_against(source, kind) for source in _sources(node))
        return next((reason for reason in reasons if reason is not None), None)

    def of(self, node: fx.Node, kind: torch.dtype, like: fx.Node) -> fx.Node:
        """The float node, in front of `like`."""
        if (node, kind) not in self._made or self._made[node, kind]._erased:
            self._made[node, kind] = self._make(node, kind, like)
        return self._made[node, kind]

    def _make(self, node: fx.Node, kind: torch.dtype, like: fx.Node) -> fx.Node:
        held = self.editor.tensor(node)
        if held is not None:
            return self.editor.constant(held.to(kind), f"{self.editor.name_of(node)}_float")
        if is_call(node, *CASTS):
            source = operands(node)[0]
            if not is_float(source):
                return self.of(source, kind, like)
            if dtype(source) == kind:
                return source
            return self.editor.call(aten._to_copy.default, source, dtype=kind, like=like)
        target: Any = aten.mm.default if is_call(node, *_PRODUCTS) else node.target
        inner = {source: self.of(source, kind, like) for source in _sources(node)}
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: inner.get(n, n))
        return self.editor.call(target, *args, like=like, before=None, **kwargs)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors that a call computes with (sizes of views are none)."""
    return [source for source in node.all_input_nodes if shape(source) is not None]


def _integers(kind: torch.dtype | None) -> tuple[int, int]:
    """Least and largest value of an integer type; of others none is known to fit."""
    if kind == torch.bool or kind not in _INTEGERS:
        return 0, int(kind == torch.bool)
    held = torch.iinfo(kind)
    return held.min, held.max


def clamp_bounds(node: fx.Node) -> tuple[Any, Any]:
    """What a clamp or relu keeps values above and below; None: nothing."""
    if is_call(node, aten.relu.default):
        return 0, None
    if is_call(node, aten.clamp_min.default):
        return operands(node)[1], None
    if is_call(node, aten.clamp_max.default):
        return None, operands(node)[1]
    return argument(node, "min"), argument(node, "max")


def _products(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float]:
    all_four = [0.0 if 0.0 in (p, q) else p * q for p in a[:2] for q in b[:2]]
    return min(all_four), max(all_four)


def _floor(number: float) -> float:
    return float(math.floor(number)) if math.isfinite(number) else number


def _ceil(number: float) -> float:
    return float(math.ceil(number)) if math.isfinite(number) else number
