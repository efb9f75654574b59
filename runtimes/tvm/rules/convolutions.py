"""Convolutions of any number of spatial dimensions, and their transposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import te, tirx

from ....compiler.errors import UnsupportedError
from ..builder import Builder, Kernel, dtype_name, fake, sizes
from .pointwise import constant
from .registry import aten, rule

Expr = Any


def spread(values: Any, rank: int) -> list[int]:
    """One number for each dimension, from as many or from one for all."""
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return values * rank if len(values) == 1 else values


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
      aten.convolution.default)  # fmt: skip
def _convolution(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, weight, bias = a["input"], a["weight"], a["bias"]
    rank = fake(weight).dim() - 2
    stride, dilation = spread(a["stride"], rank), spread(a["dilation"], rank)
    if a.get("transposed"):
        output_padding = spread(a["output_padding"], rank)
        padding = spread(a["padding"], rank)
        return transposed(
            b, node, source, weight, bias, stride, padding, output_padding, a["groups"], dilation
        )
    if isinstance(a["padding"], str):
        kernel = [int(s) for s in sizes(weight)[2:]]
        total = [d * (s - 1) if a["padding"] == "same" else 0 for d, s in zip(dilation, kernel, strict=True)]
        padding = [t // 2 for t in total]
    else:
        padding = spread(a["padding"], rank)
    return convolution(b, node, source, weight, bias, stride, padding, dilation, a["groups"])


VECTOR = 16
"""Results that are computed at once; on narrower machines two vectors of them."""


def whole_vectors(width: Expr, most: int) -> Expr:
    """A number of results in a row that fills vectors: computing some too many costs less than parts of vectors."""
    size = int(width) if isinstance(width, (int, tirx.IntImm)) else None
    if size is None or size < 4 or size % VECTOR == 0 or size > most:
        return width
    unit = 8 if size <= 8 else VECTOR
    return width if size % unit == 0 else tirx.IntImm("int64", -(-size // unit) * unit)


def whole_rows(k: Kernel, size: Any, width: Expr, most: int) -> Expr:
    """`whole_vectors` of a row's size (torch's, and here).

    An unknown one is always rounded up: what is left of a row would be computed element by element, which for 7 results
    takes up to eighty times as long.
    """
    if isinstance(width, (int, tirx.IntImm)):
        return whole_vectors(width, most)
    return k.size((size + VECTOR - 1) // VECTOR) * VECTOR


def convolution(
    b: Builder, node: fx.Node, source: fx.Node, weight: fx.Node, bias: fx.Node | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Any:  # fmt: skip
    """y[n, o, p] = sum_{c, q} x[n, g C + c, p stride + q dilation - padding] w[o, c, q] (+ bias[o])."""
    unbatched = fake(source).dim() == fake(weight).dim() - 1
    if unbatched:
        raise UnsupportedError(
            "A convolution needs a batch dimension", got=f"an input of rank {fake(source).dim()}"
        )
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        x, w, out = k.tensor(source), k.tensor(weight), k.shape(node)
        v = k.tensor(bias) if bias is not None else None
        spatial = [k.size(s) for s in sizes(source)[2:]]
        per_group = tirx.IntImm("int64", int(sizes(weight)[0]) // groups)
        inner = int(sizes(weight)[1])
        apart = stride[-1]  # results of a row read every apart-th element: those are put next to each other
        copied = any(padding) or apart > 1
        results = [*out[:-1], whole_rows(k, fake(node).shape[-1], out[-1], 256 if copied else 16)]
        if copied or results[-1] is not out[-1]:
            extended = [s + 2 * p for s, p in zip(spatial, padding, strict=True)]
            # As wide as the last position reads, which with padding "same" may be one more on the right.
            reach = [(o - 1) * s + d * (int(q) - 1) + 1 for o, s, d, q in zip(
                results[2:], stride, dilation, sizes(weight)[2:], strict=True)]  # fmt: skip
            if isinstance(results[-1], tirx.IntImm | int):
                extended = [tirx.max(e, r) for e, r in zip(extended, reach, strict=True)]
                last = tirx.floordiv(extended[-1] + apart - 1, apart)
            else:
                # Exactly what is read, without divisions of unknown sizes: only so can TVM tell that it is enough.
                extended = reach
                last = results[-1] + dilation[-1] * (int(sizes(weight)[-1]) - 1) // apart
            if apart > 1:
                extended = [*extended[:-1], apart, last]

            def filled(n: Expr, c: Expr, *i: Expr) -> Expr:
                if apart > 1:
                    i = (*i[:-2], i[-1] * apart + i[-2])
                at = [index - p for index, p in zip(i, padding, strict=True)]
                inside: Expr = None
                for index, size, p in zip(at, spatial, padding, strict=True):
                    here = tirx.And(index >= 0, index < size) if p else index < size
                    inside = here if inside is None else tirx.And(inside, here)
                return tirx.if_then_else(inside, x(n, c, *at), constant(0, dtype))

            padded = te.compute([*x.shape[:2], *extended], filled, name="padded")
        else:
            padded = x
        channel = te.reduce_axis((0, inner), "c")
        window = [te.reduce_axis((0, int(s)), f"q{d}") for d, s in enumerate(sizes(weight)[2:])]

        def element(n: Expr, o: Expr, *p: Expr) -> Expr:
            at = [i * s + q * d for i, s, q, d in zip(p, stride, window, dilation, strict=True)]
            if apart > 1:
                moved = window[-1] * dilation[-1]
                at = [*at[:-1], tirx.floormod(moved, apart), p[-1] + tirx.floordiv(moved, apart)]
            first = channel if groups == 1 else tirx.floordiv(o, per_group) * inner + channel
            return te.sum(padded(n, first, *at) * w(o, channel, *window), axis=[channel, *window])

        y = te.compute(results, element, name="conv")
        if v is None and results[-1] is out[-1]:
            return y
        if v is None:
            return te.compute(out, lambda n, o, *p: y(n, o, *p), name="y")
        return te.compute(out, lambda n, o, *p: y(n, o, *p) + v(o), name="y")

    return b.kernel(node, describe)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input)
def _conv_transpose(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = fake(a["weight"]).dim() - 2
    stride, padding, more = (spread(a[name], rank) for name in ("stride", "padding", "output_padding"))
    dilation = spread(a["dilation"], rank)
    return transposed(
        b, node, a["input"], a["weight"], a["bias"], stride, padding, more, a["groups"], dilation
    )


def transposed(
    b: Builder, node: fx.Node, source: fx.Node, weight: fx.Node, bias: fx.Node | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int],
) -> Any:  # fmt: skip
    """y[n, o, p] = sum of x[n, c, i] w[c, o, q] over i stride + q dilation - padding = p.

    Of the positions q of the kernel only every stride-th meets an input, so that the sum runs over ceil(kernel /
    stride) of them (dilation 1): nothing is multiplied by an inserted zero. The results of each phase (p + padding) %
    stride are computed next to each other, where they read neighbours of a padded x, and put in their places then.
    """
    if any(d != 1 for d in dilation):
        raise UnsupportedError(
            "A transposed convolution is lowered without dilation", got=f"dilation {list(dilation)}"
        )
    del output_padding  # part of the result's size
    dtype = dtype_name(fake(node).dtype)
    kernel = [int(s) for s in sizes(weight)[2:]]
    inner, per_group = int(sizes(weight)[0]) // groups, int(sizes(weight)[1])

    rank = len(kernel)

    def describe(k: Kernel) -> te.Tensor:
        x, w, out = k.tensor(source), k.tensor(weight), k.shape(node)
        v = k.tensor(bias) if bias is not None else None
        spatial = [k.size(s) for s in sizes(source)[2:]]
        taps = [-(-q // s) for q, s in zip(kernel, stride, strict=True)]
        channel = te.reduce_axis((0, inner), "c")
        tap = [te.reduce_axis((0, t), f"t{d}") for d, t in enumerate(taps)]
        # Place i of every phase, for all that the results need: i stride + phase = p + padding.
        steps = [
            k.size((o - 1 + p) // s + 1)
            for o, p, s in zip(fake(node).shape[2:], padding, stride, strict=True)
        ]
        last = (fake(node).shape[-1] - 1 + padding[-1]) // stride[-1] + 1
        steps[-1] = whole_rows(k, last, steps[-1], 0)
        extended = [tirx.max(n, s) + 2 * (t - 1) for n, s, t in zip(steps, spatial, taps, strict=True)]

        def filled(n: Expr, c: Expr, *i: Expr) -> Expr:
            at = [index - (t - 1) for index, t in zip(i, taps, strict=True)]
            inside: Expr = None
            for index, size in zip(at, spatial, strict=True):
                here = tirx.And(index >= 0, index < size)
                inside = here if inside is None else tirx.And(inside, here)
            return tirx.if_then_else(inside, x(n, c, *at), constant(0, dtype))

        padded = te.compute([*x.shape[:2], *extended], filled, name="padded")

        def by_phase(*i: Expr) -> Expr:
            c, o, phase, t = i[0], i[1], i[2 : 2 + rank], i[2 + rank :]
            window = [r + u * s for r, u, s in zip(phase, t, stride, strict=True)]
            if all(q % s == 0 for q, s in zip(kernel, stride, strict=True)):
                return w(c, o, *window)
            inside: Expr = None
            for q, size in zip(window, kernel, strict=True):
                inside = q < size if inside is None else tirx.And(inside, q < size)
            return tirx.if_then_else(inside, w(c, o, *window), constant(0, dtype))

        weights = te.compute([*w.shape[:2], *stride, *taps], by_phase, name="weights")

        def element(n: Expr, *i: Expr) -> Expr:
            phase, o, place = i[:rank], i[rank], i[rank + 1 :]
            first = channel if groups == 1 else tirx.floordiv(o, per_group) * inner + channel
            own = o if groups == 1 else tirx.floormod(o, per_group)
            at = [p - t + (count - 1) for p, t, count in zip(place, tap, taps, strict=True)]
            return te.sum(padded(n, first, *at) * weights(first, own, *phase, *tap), axis=[channel, *tap])

        phases = te.compute([out[0], *stride, out[1], *steps], element, name="conv_transpose")

        def result(n: Expr, o: Expr, *p: Expr) -> Expr:
            places = [position + q for position, q in zip(p, padding, strict=True)]
            phase = [tirx.floormod(place, s) for place, s in zip(places, stride, strict=True)]
            y = phases(
                n, *phase, o, *(tirx.floordiv(place, s) for place, s in zip(places, stride, strict=True))
            )
            return y if v is None else y + v(o)

        return te.compute(out, result, name="y")

    return b.kernel(node, describe)
