"""Fourier transforms of a known size as products with constant matrices.

    X[k] = sum_n x[n] w^(nk),  w = exp(-2 pi i / N)  →  [re | im] = [x.re | x.im] times cosines and sines

Up to `DIRECT` points (and for primes) that is one matrix. Above, N = P Q is split once more (Cooley and Tukey): P
points at a stride of Q, a twiddle factor each, then Q points; N (P + Q) products instead of N^2. A transform of real
values to half a spectrum has half the rows, one of half a spectrum to real values counts the inner frequencies twice.
The matrices are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import dtype, keep_exact, value
from .match import aten, operands

Pair = tuple[Any, Any]
"""Real and imaginary part: nodes or numbers; None: an imaginary part that is zero."""
FOURIER = (aten._fft_r2c.default, aten._fft_c2c.default, aten._fft_c2r.default)
DIRECT = 256
"""Points up to which one matrix is used: it has 4 N^2 numbers, and 1 MiB is what a second-level cache holds."""


class Calls(Protocol):
    """What is needed of the pass: calls in the place of the node that is rewritten."""

    editor: Editor
    at: fx.Node
    tables: dict[Any, fx.Node]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call."""

    def plus(self, x: Any, y: Any, sign: int) -> Any:
        """x + sign y."""


def transformed(p: Calls, node: fx.Node, x: Pair) -> Any:
    """A Fourier transform of a pair: a pair, or of `_fft_c2r` the real value."""
    _, given, mode, last = operands(node)
    dims = [d % value(x[0]).dim() for d in given]
    sizes = [int(value(x[0]).shape[d]) for d in dims]
    if node.target == aten._fft_c2r.default:
        for d in dims[:-1]:
            x = _along(p, x, d, inverse=True)
        sizes[-1] = int(last)
        x = _to_real(p, x, dims[-1], sizes[-1]), None
    elif node.target == aten._fft_r2c.default:
        x = _along(p, x, dims[-1], inverse=False, keep=sizes[-1] // 2 + 1 if last else None)
        for d in dims[:-1]:
            x = _along(p, x, d, inverse=False)
    else:
        for d in dims:
            x = _along(p, x, d, inverse=not last)
    scale = _scale(int(mode), sizes)
    if scale != 1:
        x = _each(x, lambda part: p.call(aten.mul.Tensor, part, scale))
    return x[0] if node.target == aten._fft_c2r.default else x


def _each(x: Pair, change: Callable[[Any], Any]) -> Pair:
    """Both parts changed alike."""
    return change(x[0]), None if x[1] is None else change(x[1])


def _rows(points: int) -> int:
    """P of the split into P Q points: the divisor nearest to the root from below; 1: one matrix."""
    if points <= DIRECT:
        return 1
    return next((r for r in range(math.isqrt(points), 1, -1) if points % r == 0), 1)


def _scale(mode: int, sizes: Sequence[int]) -> float:
    """The factor of a normalization: 0 none, 1 by the root of the points, 2 by the points."""
    points = math.prod(sizes)
    return (1.0, 1 / math.sqrt(points), 1 / points)[mode]


def _along(p: Calls, x: Pair, dim: int, *, inverse: bool, keep: int | None = None) -> Pair:
    """The transform of one dimension; `keep`: its first frequencies alone."""
    last = value(x[0]).dim() - 1
    x = _last(p, _swapped(p, x, dim, last), inverse=inverse, keep=keep)
    return _swapped(p, x, dim, last)


def _swapped(p: Calls, x: Pair, a: int, b: int) -> Pair:
    return x if a == b else _each(x, lambda part: p.call(aten.transpose.int, part, a, b))


def _last(p: Calls, x: Pair, *, inverse: bool, keep: int | None = None) -> Pair:
    points = int(value(x[0]).shape[-1])
    rows = _rows(points)
    if rows == 1:
        return _product(p, x, torch.arange(keep or points), torch.arange(points), points, inverse)
    # n = columns n1 + n2, k = k1 + rows k2
    columns = points // rows
    x = _each(x, lambda part: p.call(aten.unflatten.int, part, -1, [rows, columns]))
    last = value(x[0]).dim() - 1
    x = _along(p, x, last - 1, inverse=inverse)
    cos, sin = _table(torch.outer(torch.arange(rows), torch.arange(columns)), points)
    x = _turned(p, x, cos, sin if inverse else 0.0 - sin)
    x = _swapped(p, _last(p, x, inverse=inverse), last - 1, last)
    x = _each(x, lambda part: p.call(aten.flatten.using_ints, part, -2, -1))
    if keep is None or keep == points:
        return x
    return _each(x, lambda part: p.call(aten.slice.Tensor, part, -1, 0, keep, 1))


def _table(turns: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `turns / points` of a full turn.

    Whole turns are taken off in integers, and quarters are exact: the imaginary part of a real sum is zero, not noise
    whose sign an angle would see.
    """
    turns = turns % points
    angle = turns.double() * (2 * math.pi / points)
    half, quarter = 2 * turns % points == 0, 4 * turns % points == 0
    return angle.cos().masked_fill(quarter & ~half, 0.0), angle.sin().masked_fill(half, 0.0)


def _turned(p: Calls, x: Pair, real: Tensor, imaginary: Tensor) -> Pair:
    """The product with a table of complex numbers."""
    a, b = x
    cos, sin = (_constant(p, table, a) for table in (real, imaginary))
    times = lambda u, v: None if u is None else p.call(aten.mul.Tensor, u, v)  # noqa: E731
    return p.plus(times(a, cos), times(b, sin), -1), p.plus(times(a, sin), times(b, cos), 1)


def _product(p: Calls, x: Pair, k: Tensor, n: Tensor, points: int, inverse: bool) -> Pair:
    cos, sin = _table(torch.outer(k, n), points)
    sin = sin if inverse else 0.0 - sin
    return _linear(p, x, cos, -sin), _linear(p, x, sin, cos)


def _linear(p: Calls, x: Pair, real: Tensor, imaginary: Tensor) -> fx.Node:
    """real x.re + imaginary x.im, as one product."""
    a, b = x
    if b is None:
        return p.call(aten.linear.default, a, _constant(p, real, a))
    joined = p.call(aten.cat.default, [a, b], -1)
    return p.call(aten.linear.default, joined, _constant(p, torch.cat([real, imaginary], -1), a))


def _to_real(p: Calls, x: Pair, dim: int, points: int) -> fx.Node:
    """The real values of the spectrum whose first half is x."""
    last = value(x[0]).dim() - 1
    x = _swapped(p, x, dim, last)
    if _rows(points) == 1:
        k = torch.arange(points // 2 + 1)
        cos, sin = _table(torch.outer(torch.arange(points), k), points)
        twice = torch.where((k == 0) | (2 * k == points), 1.0, 2.0).double()
        real = _linear(p, x, cos * twice, -sin * twice)
    else:
        real = _last(p, _mirrored(p, x, points), inverse=True)[0]
    swapped: fx.Node = _swapped(p, (real, None), dim, last)[0]
    return swapped


def _mirrored(p: Calls, x: Pair, points: int) -> Pair:
    """The whole spectrum of real values: frequency N - k is the conjugate of k."""
    inner = (points + 1) // 2  # frequencies 1 to inner - 1 have a mirror image

    def joined(part: Any, sign: int) -> Any:
        if part is None:
            return None
        back = p.call(aten.flip.default, p.call(aten.slice.Tensor, part, -1, 1, inner, 1), [-1])
        back = back if sign == 1 else p.call(aten.neg.default, back)
        return p.call(aten.cat.default, [part, back], -1)

    return joined(x[0], 1), joined(x[1], -1)


def _constant(p: Calls, table: Tensor, like: fx.Node) -> fx.Node:
    """A table of sines and cosines; equal ones are one."""
    kind = dtype(like)
    assert kind is not None
    table = table.to(kind)
    key = (table.shape, table.dtype, table.numpy().tobytes())
    if key not in p.tables:
        p.tables[key] = keep_exact(p.editor.constant(table, "fourier"), "it is a Fourier transform's matrix")
    return p.tables[key]
