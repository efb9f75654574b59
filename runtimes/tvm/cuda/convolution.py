"""`conv_packed` as a product: pairs of the samples, codes of every output pixel's inputs, the product, a transposition.

    u[(b, p), k] = code of x at (channel, kernel position) k of pixel p, the zero point where it is padding
    y[(b, p), o] = the packed linear;   result[b, o, p]

The matrix of codes is one byte for each output pixel and input; a convolution whose input is read many times from it
pays in memory, not in arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import ceil_to
from .builder import Frame, Size, Tensor, bind, get, local, put, when, wide
from .epilogue import Linear
from .layouts import integer_layout
from .linears import add_product
from .plan import Call, Dimension, Plan
from .pointwise import add_pointwise
from .samples import add_pairs, code_of
from .weights import Weights


@dataclass(frozen=True)
class Window:
    """The kernel's geometry, per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def outputs(self, space: Sequence[Dimension]) -> list[Dimension]:
        """Sizes of the result for sizes of the input (ints or int64 expressions)."""
        found = []
        for size, k, s, p, d in zip(
            space, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            last = size + (2 * p - d * (k - 1) - 1)
            found.append((last // s if isinstance(size, int) else T.truncdiv(last, T.int64(s))) + 1)
        return found

    @property
    def tag(self) -> str:
        """A part of kernels' names."""
        return "_".join(
            "x".join(map(str, v)) for v in (self.kernel, self.stride, self.padding, self.dilation)
        )


def conv_packed(call: Call) -> Plan:
    """`isofold.conv_packed`."""
    plan, attributes = Plan(), call.attributes
    window = Window(*(tuple(attributes[name]) for name in ("kernel", "stride", "padding", "dilation")))
    shape = call["x"].shape
    channels, n = int(shape[1]), attributes["n"]
    out = window.outputs(shape[2:])
    batch, pixels = plan.size("batch", shape[0]), plan.size("pixels", math.prod(out))
    space = [plan.size(f"in{i}", s) for i, s in enumerate(shape[2:])]
    rows = plan.size("m", math.prod(out, start=shape[0]))
    k, static = channels * math.prod(window.kernel), call.has("params")
    plan.flat(call, "params", "weight", "scale", "wsum", "bias")
    if not static:
        length = plan.size("length", math.prod(shape[2:], start=channels))
        plan.view("x@samples", batch, length)
        add_pairs(plan, batch, length, "x@samples")
    _add_codes(plan, window, channels, batch, space, rows, k, static)
    if not static:
        _add_params(plan, batch, rows)
    linear = Linear(rows, k, n, attributes["activation"], False, call.has("bias"), False)
    add_product(plan, linear, Weights(integer_layout(8), 0, "float32"), "codes", static)
    _add_transposition(plan, batch, pixels, rows, n)
    plan.results = ("result",)
    return plan


def _add_codes(
    plan: Plan,
    window: Window,
    channels: int,
    batch: Size,
    space: list[Size],
    rows: Size,
    k: int,
    static: bool,
) -> None:
    kp = ceil_to(k, 32)
    image = Tensor(plan.view("x", batch, channels, *space), (batch, channels, *space), "float32")
    pair = Tensor("params", (2,), "float32") if static else Tensor("pairs", (batch, 2), "float32")

    def body(f: Frame, i: Any) -> Any:
        sizes = [f.size(s) for s in space]
        outputs = window.outputs(sizes)
        row, place = bind(T.truncdiv(i, T.int64(kp))), bind(T.truncmod(i, T.int64(kp)))
        pixel: Any = row
        where: list[Any] = []
        for size in reversed(outputs):
            where.insert(0, bind(T.truncmod(pixel, wide(size))))
            pixel = bind(T.truncdiv(pixel, wide(size)))
        sample, rest = pixel, place
        taps: list[Any] = []
        for size in reversed(window.kernel):
            taps.insert(0, bind(T.truncmod(rest, T.int64(size))))
            rest = bind(T.truncdiv(rest, T.int64(size)))
        index: Any = sample * channels + rest
        inside: Any = place < k
        for axis, size in enumerate(sizes):
            spot = (
                where[axis] * window.stride[axis] + taps[axis] * window.dilation[axis] - window.padding[axis]
            )
            spot = bind(spot)
            inside = T.And(inside, T.And(spot >= 0, spot < wide(size)))
            index = index * wide(size) + spot
        first = 0 if static else sample * 2
        s, z = bind(get(f[pair.name], first)), bind(get(f[pair.name], first + 1))
        result = local(1)
        put(result, 0, T.Select(place < k, z, T.float32(0)))
        with when(inside):
            put(result, 0, code_of(get(f["x"], index), T.float32(1) / s, z, 8))
        return T.cast(T.cast(get(result, 0), "int32"), "uint8")

    name = f"gather_{channels}_{window.tag}{'_s' if static else ''}"
    add_pointwise(plan, name, [image, pair], Tensor("u", (rows, kp), "uint8"), body)


def _add_params(plan: Plan, batch: Size, rows: Size) -> None:
    """A pair for every pixel from that of its sample."""

    def body(f: Frame, i: Any) -> Any:
        pixels = T.truncdiv(wide(f.size(rows)), wide(f.size(batch)))
        sample = T.truncdiv(T.truncdiv(i, T.int64(2)), pixels)
        return get(f["pairs"], sample * 2 + T.truncmod(i, T.int64(2)))

    inputs = [Tensor("pairs", (batch, 2), "float32")]
    add_pointwise(plan, "spread_pairs", inputs, Tensor("params", (rows, 2), "float32"), body)


def _add_transposition(plan: Plan, batch: Size, pixels: Size, rows: Size, n: int) -> None:
    def body(f: Frame, i: Any) -> Any:
        count = wide(f.size(pixels))
        pixel, rest = T.truncmod(i, count), T.truncdiv(i, count)
        feature, sample = T.truncmod(rest, T.int64(n)), T.truncdiv(rest, T.int64(n))
        return get(f["y"], (sample * count + pixel) * n + feature)

    inputs, output = [Tensor("y", (rows, n), "float32")], Tensor("result", (batch, n, pixels), "float32")
    add_pointwise(plan, f"features_first_{n}", inputs, output, body)
