"""Pooling, and resizing by interpolation, over any number of spatial dimensions.

A window of pooling begins at `stride i - padding`; adaptive ones lie between `floor(i S / O)` and
`ceil((i + 1) S / O)`. An average divides by the kernel's size, by what of the window lies in the padded input
(`ceil_mode`), or by what lies in the input (`count_include_pad=False`), as PyTorch documents it. Interpolation reads at
`(i + 1/2) r - 1/2`, or at `i r` with aligned corners, from the nearest, the two next or the four next values of each
dimension (cubic: a = -3/4); `r` is the given factor's inverse, or the ratio of the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from torch import fx
from tvm import te, tirx

from ....compiler.errors import UnsupportedError
from ..builder import Builder, Kernel, dtype_name, fake
from .convolutions import spread
from .pointwise import constant
from .registry import aten, rule

Expr = Any


def _rank(node: fx.Node) -> int:
    """Spatial dimensions, from the operator's name."""
    return next(int(part[0]) for part in ("1d", "2d", "3d") if part in str(node.target))


def _windows(
    b: Builder, node: fx.Node, source: fx.Node, reach: Callable[[Expr, Expr, int], tuple[Expr, Expr]],
    extents: Callable[[te.Tensor, int], Expr], step: Sequence[int], reduce_: Callable[..., Any], outside: float,
    divisor: Callable[[Sequence[tuple[Expr, Expr]], Sequence[Expr]], Expr] | None,
) -> Any:  # fmt: skip
    """Reduce windows: `reach(i, size, d)` is where one begins and ends, `extents` its most elements in a dimension.

    What lies outside the input, or behind the end, counts as `outside`. divisor: of the reaches and the input's sizes.
    """
    dtype, rank = dtype_name(fake(node).dtype), len(step)

    def body(k: Kernel) -> te.Tensor:
        x = k.tensor(source)
        lead = len(x.shape) - rank
        window = [te.reduce_axis((0, extents(x, d)), f"q{d}") for d in range(rank)]

        def reaches(i: Sequence[Expr]) -> list[tuple[Expr, Expr]]:
            return [reach(i[lead + d], x.shape[lead + d], d) for d in range(rank)]

        def element(*i: Expr) -> Expr:
            at, inside = [], None
            for d, (begin, end) in enumerate(reaches(i)):
                place = begin + window[d] * step[d]
                here = tirx.all(place >= 0, place < x.shape[lead + d], place < end)
                inside = here if inside is None else tirx.all(inside, here)
                at.append(place)
            found = x(*i[:lead], *at)
            return reduce_(tirx.if_then_else(inside, found, constant(outside, dtype)), axis=window)

        y = te.compute(k.shape(node), element, name="pool")
        if divisor is None:
            return y

        def average(*i: Expr) -> Expr:
            number = divisor(reaches(i), x.shape[lead:])
            if isinstance(number, (int, float)):
                return y(*i) * constant(1 / number, dtype)
            return y(*i) / _real(number, dtype)

        return te.compute(k.shape(node), average, name="y")

    return b.kernel(node, body)


@rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def _max_pool(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = _rank(node)
    kernel, padding, dilation = (spread(a[name], rank) for name in ("kernel_size", "padding", "dilation"))
    stride = spread(a["stride"], rank) if a["stride"] else kernel

    def reach(i: Expr, size: Expr, d: int) -> tuple[Expr, Expr]:
        return i * stride[d] - padding[d], size

    return _windows(b, node, a["self"], reach, lambda x, d: kernel[d], dilation, te.max, float("-inf"), None)


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = _rank(node)
    kernel, padding = spread(a["kernel_size"], rank), spread(a["padding"], rank)
    stride = spread(a["stride"], rank) if a["stride"] else kernel
    fixed = a.get("divisor_override")
    if fixed is None and not a["ceil_mode"] and (a["count_include_pad"] or not any(padding)):
        fixed = math.prod(kernel)

    def reach(i: Expr, size: Expr, d: int) -> tuple[Expr, Expr]:
        begin = i * stride[d] - padding[d]
        return begin, tirx.min(begin + kernel[d], size + padding[d])

    def divisor(reaches: Sequence[tuple[Expr, Expr]], sizes: Sequence[Expr]) -> Expr:
        if fixed is not None:
            return fixed
        number: Expr = 1
        for (begin, end), size in zip(reaches, sizes, strict=True):
            whole = a["count_include_pad"]
            number = number * (end - begin if whole else tirx.min(end, size) - tirx.max(begin, 0))
        return number

    return _windows(b, node, a["self"], reach, lambda x, d: kernel[d], [1] * rank, te.sum, 0.0, divisor)


@rule(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
      aten._adaptive_avg_pool2d.default)  # fmt: skip
def _adaptive_avg_pool(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = _rank(node)
    wanted = spread(a["output_size"], rank)
    if any(not isinstance(w, int) for w in wanted):
        raise UnsupportedError("Adaptive average pooling is lowered to sizes that are known", got=f"{wanted}")

    def reach(i: Expr, size: Expr, d: int) -> tuple[Expr, Expr]:
        number = wanted[d]
        if number == 1:
            return tirx.const(0, "int64"), size
        return tirx.floordiv(i * size, number), tirx.floordiv((i + 1) * size + number - 1, number)

    def extent(x: te.Tensor, d: int) -> Expr:
        size, number = x.shape[len(x.shape) - rank + d], wanted[d]
        return size if number == 1 else tirx.floordiv(size + number - 1, number) + 1

    def divisor(reaches: Sequence[tuple[Expr, Expr]], sizes: Sequence[Expr]) -> Expr:
        number: Expr = 1
        for begin, end in reaches:
            number = number * (end - begin)
        return number

    return _windows(b, node, a["self"], reach, extent, [1] * rank, te.sum, 0.0, divisor)


# ---- resizing


def _factors(node: fx.Node, a: dict[str, Any]) -> list[float | None]:
    """The factors that were given, by dimension; None where the sizes decide."""
    rank = _rank(node)
    if "scale_factors" in a:
        return list(a["scale_factors"] or [None] * rank)
    names = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}[rank]
    return [a.get(name) for name in names]


def _real(whole: Expr, dtype: str) -> Expr:
    """A whole number as a float.

    TVM's analysis of ranges fails on a float variable that stands for one whose bounds it knows ("IntImm supports only
    int"), so they are hidden from it.
    """
    if isinstance(whole, (int, tirx.IntImm)):
        return tirx.const(float(int(whole)), dtype)
    return tirx.Cast(dtype, tirx.reinterpret("int64", tirx.Cast("int64", whole)))


def _whole(factor: float | None) -> bool:
    return factor is None or factor == int(factor)


@rule(aten.upsample_nearest1d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.default,
      aten.upsample_nearest2d.vec, aten.upsample_nearest3d.default, aten.upsample_nearest3d.vec)  # fmt: skip
def _upsample_nearest(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    factors = _factors(node, a)

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        out = k.shape(node)

        def at(place: Expr, size: Expr, made: Expr, factor: float | None) -> Expr:
            if _whole(factor):
                return tirx.floordiv(place * size, made)
            step = tirx.const(1.0 / float(factor or 1), "float32")
            return tirx.min(tirx.Cast("int64", tirx.floor(_real(place, "float32") * step)), size - 1)

        def element(n: Expr, c: Expr, *i: Expr) -> Expr:
            return x(n, c, *map(at, i, x.shape[2:], out[2:], factors))

        return element

    return b.elements(node, [next(iter(a.values()))], body)


def _linear(t: Expr, real: str) -> list[tuple[int, Expr]]:
    return [(0, tirx.const(1.0, real) - t), (1, t)]


def _cubic(t: Expr, real: str) -> list[tuple[int, Expr]]:
    """Weights of the values at -1, 0, 1 and 2 (Keys 1981, with PyTorch's a)."""
    number = lambda v: tirx.const(v, real)  # noqa: E731
    a, one = -0.75, tirx.const(1.0, real)

    def near(d: Expr) -> Expr:  # up to a distance of 1
        return (number(a + 2) * d - number(a + 3)) * d * d + one

    def far(d: Expr) -> Expr:  # from there to 2
        return ((number(a) * d - number(5 * a)) * d + number(8 * a)) * d - number(4 * a)

    return [(-1, far(t + one)), (0, near(t)), (1, near(one - t)), (2, far(one - t + one))]


@rule(aten.upsample_linear1d.default, aten.upsample_linear1d.vec, aten.upsample_bilinear2d.default,
      aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.default, aten.upsample_trilinear3d.vec,
      aten.upsample_bicubic2d.default, aten.upsample_bicubic2d.vec)  # fmt: skip
def _interpolate(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, factors = dtype_name(fake(node).dtype), _factors(node, a)
    taps = _cubic if "cubic" in str(node.target) else _linear
    real = "float64" if dtype == "float64" else "float32"

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        out = k.shape(node)
        half = tirx.const(0.5, real)

        def place(i: Expr, size: Expr, made: Expr, factor: float | None) -> tuple[Expr, Expr]:
            """The value before a place, and how far behind that the place is."""
            if a["align_corners"]:
                steps, at = tirx.max(made - 1, 1), i * (size - 1)
                return tirx.floordiv(at, steps), _real(tirx.floormod(at, steps), real) / _real(steps, real)
            ratio = (
                _real(size, real) / _real(made, real) if factor is None else tirx.const(1.0 / factor, real)
            )
            # In front of the first value both of two are that one: as if the place were 0, which PyTorch makes it.
            found = (_real(i, real) + half) * ratio - half
            return tirx.Cast("int64", tirx.floor(found)), found - tirx.floor(found)

        def element(n: Expr, c: Expr, *i: Expr) -> Expr:
            choices = []
            for at, size, made, factor in zip(i, x.shape[2:], out[2:], factors, strict=True):
                begin, behind = place(at, size, made, factor)
                weights = taps(behind, real)
                choices.append([(tirx.max(tirx.min(begin + o, size - 1), 0), w) for o, w in weights])
            total: Expr = None
            for chosen in product(*choices):
                weight = chosen[0][1]
                for _, other in chosen[1:]:
                    weight = weight * other
                part = tirx.Cast(real, x(n, c, *(where for where, _ in chosen))) * weight
                total = part if total is None else total + part
            return tirx.Cast(dtype, total)

        return element

    return b.elements(node, [next(iter(a.values()))], body)
