"""Operators that move elements: reshapes, transposes, slices, concatenation, padding, repetition.

A reshape shares memory with its source where nothing is fused with it. Everything else is a copy by index, which TVM
fuses into its reader where that is one of its own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from tvm import te, tirx

from ....compiler.errors import UnsupportedError
from ....compiler.graph import value
from ..builder import Builder, Kernel, fake, sizes
from .pointwise import constant, dtype_name, equal
from .registry import aten, rule

Expr = Any


@rule(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten._reshape_copy.default,
    aten.view_copy.default, aten.atleast_1d.default,
)  # fmt: skip
def _reshape(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return b.reshape(node, next(iter(a.values())))


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    if [str(s) for s in sizes(a["self"])] == [str(s) for s in sizes(node)]:
        return b[a["self"]]
    return b.elements(node, [a["self"]], lambda k, x: lambda *i: k.at(x, i, k.result))


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.movedim.intlist,
      aten.swapaxes.default, aten.numpy_T.default, aten.mT.default)  # fmt: skip
def _permute(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source = a["self"]
    order = _order(node, fake(source).dim())
    moved = [d for d in order if not _is_one(sizes(source)[d])]
    if moved == sorted(moved):  # only sizes of 1 change their place
        return b.reshape(node, source)

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        def element(*i: Expr) -> Expr:
            at: list[Expr] = [0] * len(order)
            for position, d in enumerate(order):
                at[d] = i[position]
            return x(*at)

        return element

    return b.elements(node, [source], body, "transpose")


def _order(node: fx.Node, rank: int) -> list[int]:
    """The source's dimension for each of the result's: the operator itself applied to the numbers of dimensions."""
    assert callable(node.target)
    source = next(n for n in node.args if isinstance(n, fx.Node))
    marked = torch.empty([d + 2 for d in range(rank)], device="meta")
    given = [marked if n is source else n for n in node.args]
    kwargs = {name: marked if n is source else n for name, n in node.kwargs.items()}
    return [size - 2 for size in node.target(*given, **kwargs).shape]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def clamped_start(k: Kernel, start: Any, extent: Any) -> Expr:
    """Where a slice starts: negative counts from the end, and it stays inside."""
    if isinstance(start, int):
        if start == 0:
            return 0
        if start > 0 and isinstance(extent, int):
            return min(start, extent)
        if isinstance(extent, int):
            return max(0, start + extent)
    size, at = k.size(extent), k.size(start)
    at = at if not isinstance(at, int) else tirx.IntImm("int64", at)
    size = size if not isinstance(size, int) else tirx.IntImm("int64", size)
    return tirx.min(tirx.max(tirx.Select(at < 0, at + size, at), 0), size)


@rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def _slice(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, dim, step = a["self"], a["dim"] % fake(node).dim(), a["step"]
    if [str(s) for s in sizes(source)] == [str(s) for s in sizes(node)] and step == 1:
        return b[source]
    start = 0 if a["start"] is None else a["start"]
    return _window(b, node, source, dim, start, step)


@rule(aten.narrow.default)
def _narrow(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _window(b, node, a["self"], a["dim"] % fake(node).dim(), a["start"], 1)


def _window(b: Builder, node: fx.Node, source: fx.Node, dim: int, start: Any, step: int) -> Any:
    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        first = clamped_start(k, start, sizes(source)[dim])

        def element(*i: Expr) -> Expr:
            return x(*(first + index * step if d == dim else index for d, index in enumerate(i)))

        return element

    return b.elements(node, [source], body, "slice")


@rule(aten.select.int, aten.select_copy.int)
def _select(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, dim = a["self"], a["dim"] % fake(a["self"]).dim()

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        at = clamped_start(k, a["index"], sizes(source)[dim])
        return lambda *i: x(*i[:dim], at, *i[dim:])

    return b.elements(node, [source], body, "select")


def _parts(b: Builder, node: fx.Node, source: fx.Node, dim: int, keep: bool = True) -> tuple[Any, ...]:
    """The pieces along a dimension, those that something reads; the others are None."""
    fakes = value(node)
    read_ = {user.args[1] for user in node.users if isinstance(user.args[1], int)}
    made: list[Any] = []
    start: Any = sympy.Integer(0)
    for position, piece in enumerate(fakes):
        here = start
        extent = piece.shape[dim] if keep else 1
        start = start + (extent.node.expr if isinstance(extent, torch.SymInt) else int(extent))
        if position not in read_ and not any(u.op == "output" for u in node.users):
            made.append(None)
            continue

        def describe(k: Kernel, here: Any = here, piece: torch.Tensor = piece) -> te.Tensor:
            x, first = k.tensor(source), k.size(here)
            shape = [k.size(s) for s in piece.shape]
            if keep:
                return te.compute(
                    shape, lambda *i: x(*(first + at if d == dim else at for d, at in enumerate(i))), name="y"
                )
            return te.compute(shape, lambda *i: x(*i[:dim], first, *i[dim:]), name="y")

        made.append(b.kernel(node, describe, "split", [piece]))
    return tuple(made)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes,
      aten.split_with_sizes_copy.default, aten.tensor_split.sections)  # fmt: skip
def _split(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source = next(iter(a.values()))
    return _parts(b, node, source, a["dim"] % fake(source).dim())


@rule(aten.unbind.int)
def _unbind(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    return _parts(b, node, a["self"], a["dim"] % fake(a["self"]).dim(), keep=False)


@rule(aten.cat.default)
def _cat(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dim = a["dim"] % fake(node).dim()
    parts = [p for p in a["tensors"] if not any(isinstance(s, int) and s == 0 for s in sizes(p))] or a[
        "tensors"
    ]
    if len(parts) == 1 and fake(parts[0]).dtype == fake(node).dtype:
        return b.reshape(node, parts[0])
    return _joined(b, node, parts, dim)


def _joined(b: Builder, node: fx.Node, parts: Sequence[fx.Node], dim: int) -> Any:
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        tensors = [k.tensor(p) for p in parts]
        starts: list[Expr] = [tirx.IntImm("int64", 0)]
        for part in parts:
            starts.append(starts[-1] + k.size(sizes(part)[dim]))

        def element(*i: Expr) -> Expr:
            at = i[dim]
            result = None
            for x, start, end in reversed(list(zip(tensors, starts, starts[1:], strict=False))):
                one = x(*(at - start if d == dim else index for d, index in enumerate(i))).astype(dtype)
                # Reads outside of a part must not happen, so it is a branch and no selection.
                result = one if result is None else tirx.if_then_else(at < end, one, result)
            return result

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe, "concatenate")


@rule(aten.stack.default)
def _stack(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dim = a["dim"] % fake(node).dim()

    def describe(k: Kernel) -> te.Tensor:
        tensors = [k.tensor(p) for p in a["tensors"]]

        def element(*i: Expr) -> Expr:
            own = (*i[:dim], *i[dim + 1 :])
            result = tensors[-1](*own)
            for position in range(len(tensors) - 2, -1, -1):
                result = tirx.Select(equal(i[dim], position), tensors[position](*own), result)
            return result

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(aten.pad.default, aten.constant_pad_nd.default, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
      aten.replication_pad1d.default, aten.replication_pad2d.default)  # fmt: skip
def _pad(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source: fx.Node = a["self"]
    widths: list[Any] = a["pad"] if "pad" in a else a["padding"]
    name = str(node.target)
    mode = a.get(
        "mode", "reflect" if "reflection" in name else "replicate" if "replication" in name else "constant"
    )
    fill = a.get("value")
    rank, padded = fake(source).dim(), len(widths) // 2
    dtype = dtype_name(fake(node).dtype)
    if mode not in ("constant", "reflect", "replicate"):
        raise UnsupportedError(
            "This padding is not lowered", expected="constant | reflect | replicate", got=repr(mode)
        )

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        before = {rank - 1 - p: k.size(widths[2 * p]) for p in range(padded)}
        untouched = {rank - 1 - p for p in range(padded) if widths[2 * p] == 0 and widths[2 * p + 1] == 0}

        def element(*i: Expr) -> Expr:
            at = [
                index - before[d] if d in before and d not in untouched else index
                for d, index in enumerate(i)
            ]
            inside: Expr = None
            for d in range(rank):
                if d not in before or d in untouched:
                    continue
                size = x.shape[d]
                if mode == "constant":
                    here = tirx.And(at[d] >= 0, at[d] < size)
                    inside = here if inside is None else tirx.And(inside, here)
                elif mode == "replicate":
                    at[d] = tirx.min(tirx.max(at[d], 0), size - 1)
                else:
                    reflected = tirx.Select(at[d] < 0, -at[d], at[d])
                    at[d] = tirx.Select(reflected >= size, 2 * size - 2 - reflected, reflected)
            found = x(*at)
            filled = constant(0 if fill is None else fill, dtype)
            return found if inside is None else tirx.if_then_else(inside, found, filled)

        return element

    return b.elements(node, [source], body, "pad")


@rule(aten.repeat.default, aten.tile.default)
def _repeat(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        rank = len(x.shape)

        def element(*i: Expr) -> Expr:
            own = i[len(i) - rank :]
            return x(*(0 if _one(s) else tirx.floormod(at, s) for s, at in zip(x.shape, own, strict=True)))

        return element

    return b.elements(node, [a["self"]], body)


def _one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    if a["dim"] is None and fake(a["self"]).dim() != 1:
        raise UnsupportedError("repeat_interleave is lowered along a dimension", got="dim=None")
    dim = (a["dim"] or 0) % fake(node).dim()

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        times = k.size(a["repeats"])
        return lambda *i: x(*(tirx.floordiv(at, times) if d == dim else at for d, at in enumerate(i)))

    return b.elements(node, [a["self"]], body)


@rule(aten.flip.default)
def _flip(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dims = {d % fake(node).dim() for d in a["dims"]}

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        return lambda *i: x(*(x.shape[d] - 1 - at if d in dims else at for d, at in enumerate(i)))

    return b.elements(node, [a["self"]], body)


@rule(aten.roll.default)
def _roll(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    if not a["dims"]:
        raise UnsupportedError("roll is lowered with dims only", got="dims=[]")
    shifts = {d % fake(node).dim(): s for d, s in zip(a["dims"], a["shifts"], strict=True)}

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        def element(*i: Expr) -> Expr:
            at = list(i)
            for d, shift in shifts.items():
                at[d] = tirx.floormod(at[d] - k.size(shift), x.shape[d])
            return x(*at)

        return element

    return b.elements(node, [a["self"]], body)


@rule(aten.tril.default, aten.triu.default)
def _triangle(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    lower = node.target is aten.tril.default
    dtype = dtype_name(fake(node).dtype)

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        offset = k.size(a["diagonal"])

        def element(*i: Expr) -> Expr:
            distance = i[-1] - i[-2]
            kept = distance <= offset if lower else distance >= offset
            return tirx.Select(kept, x(*i), constant(0, dtype))

        return element

    return b.elements(node, [a["self"]], body)


@rule(aten.diff.default)
def _diff(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    source, dim, before = a["self"], a["dim"] % fake(node).dim(), a["prepend"]
    if a["n"] != 1 or a["append"] is not None or (before is not None and fake(before).shape[dim] != 1):
        raise UnsupportedError("diff is lowered for n=1, at most one element in front and none behind")
    dtype = dtype_name(fake(node).dtype)

    def describe(k: Kernel) -> te.Tensor:
        x = k.tensor(source)
        first = k.tensor(before) if before is not None else None

        def element(*i: Expr) -> Expr:
            def read_at(shift: int) -> Expr:
                return x(*(at + shift if d == dim else at for d, at in enumerate(i)))

            if first is None:
                return read_at(1) - read_at(0)
            own = first(*(0 if d == dim else at for d, at in enumerate(i))).astype(dtype)
            return read_at(0) - tirx.if_then_else(equal(i[dim], 0), own, read_at(-1))

        return te.compute(k.shape(node), element, name="y")

    return b.kernel(node, describe)


@rule(aten.diagonal.default)
def _diagonal(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = fake(a["self"]).dim()
    one, two, offset = a["dim1"] % rank, a["dim2"] % rank, a["offset"]

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        def element(*i: Expr) -> Expr:
            rest = list(i[:-1])
            at: list[Expr] = [None] * rank
            at[one], at[two] = i[-1] + max(0, -offset), i[-1] + max(0, offset)
            return x(*(rest.pop(0) if index is None else index for index in at))

        return element

    return b.elements(node, [a["self"]], body)


@rule(aten.unfold.default)
def _unfold(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    dim, step = a["dimension"] % max(1, fake(a["self"]).dim()), a["step"]

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        return lambda *i: x(*(at * step + i[-1] if d == dim else at for d, at in enumerate(i[:-1])))

    return b.elements(node, [a["self"]], body)


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(b: Builder, node: fx.Node, a: dict[str, Any]) -> Any:
    r = a["upscale_factor"]

    def body(k: Kernel, x: te.Tensor) -> Callable[..., Expr]:
        def element(*i: Expr) -> Expr:
            *batch, c, h, w = i
            channel = (c * r + tirx.floormod(h, r)) * r + tirx.floormod(w, r)
            return x(*batch, channel, tirx.floordiv(h, r), tirx.floordiv(w, r))

        return element

    return b.elements(node, [a["self"]], body)
