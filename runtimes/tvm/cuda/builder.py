"""Writing GPU kernels in TIR: tensors with symbolic sizes, flat views of them, threads, and calls of device functions.

    def emit(k: Frame) -> None:
        with launch([k.size("m")], 256) as ((row,), tx):
            i = wide(row) * 256 + wide(tx)
            put(k["y"], i, get(k["x"], i) * 2)

    double = prim_func("double", [Tensor("x", ("m", 256), "float32"), Tensor("y", ("m", 256), "float32")], emit)

A size is an int or the name of a symbol; symbols are int64 and bound by the shapes of the arguments. Inside a kernel
every tensor is a flat buffer. Python loops unroll; indices of threads are int32, so a row offset that may pass 2^31
must be made int64 (:func:`wide`). Functions of `device.h` are called by name (:func:`call`, :func:`value`).
Nothing inserts barriers: write :func:`sync`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Size = int | str
"""A static size, or the name of a symbolic one."""


@dataclass(frozen=True)
class Tensor:
    """An argument of a kernel."""

    name: str
    shape: tuple[Size, ...]
    dtype: str


class Frame:
    """A kernel that is being written: its tensors as flat buffers, its symbols as int64 variables."""

    def __init__(self, buffers: dict[str, Any], symbols: dict[str, Any]) -> None:
        self.buffers = buffers
        self.symbols = symbols

    def __getitem__(self, name: str) -> Any:
        return self.buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.buffers

    def size(self, size: Size) -> Any:
        """A size as an int, or as the int64 variable of its symbol."""
        return size if isinstance(size, int) else self.symbols[size]


def prim_func(name: str, tensors: Sequence[Tensor], emit: Callable[[Frame], None]) -> tirx.PrimFunc:
    """The TIR function of a kernel; its arguments are `tensors` in their order."""
    with IRBuilder() as builder, T.prim_func(False, False):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name, "isofold.cuda": True})
        symbols: dict[str, Any] = {}
        for tensor in tensors:
            for size in tensor.shape:
                if isinstance(size, str) and size not in symbols:
                    symbols[size] = tirx.Var(size, "int64")
        handles = [T.arg(t.name, T.handle()) for t in tensors]
        shapes = [
            [tirx.const(s, "int64") if isinstance(s, int) else symbols[s] for s in t.shape] for t in tensors
        ]
        matched = [T.match_buffer(h, s, t.dtype) for h, s, t in zip(handles, shapes, tensors, strict=True)]
        buffers: dict[str, Any] = {}
        for tensor, shape, whole in zip(tensors, shapes, matched, strict=True):
            total = math.prod(shape, start=tirx.const(1, "int64"))
            buffers[tensor.name] = T.decl_buffer((total,), tensor.dtype, data=whole.data, layout=None)
        emit(Frame(buffers, symbols))
    return builder.get()


@contextmanager
def launch(grid: Sequence[Any], threads: int) -> Iterator[tuple[list[Any], Any]]:
    """A kernel of `threads` threads a block: yields the block's indices (int32) and the thread's."""
    frames = [T.launch_thread(f"blockIdx.{axis}", size) for axis, size in zip("xyz", grid, strict=False)]
    frames.append(T.launch_thread("threadIdx.x", threads))
    indices = [frame.__enter__() for frame in frames]
    try:
        yield [narrow(i) for i in indices[:-1]], indices[-1]
    finally:
        for frame in reversed(frames):
            frame.__exit__(None, None, None)


def narrow(value: Any) -> Any:
    """A value that fits as int32."""
    return value if isinstance(value, int) or str(value.ty.dtype) == "int32" else T.cast(value, "int32")


def wide(value: Any) -> Any:
    """A value as int64."""
    if isinstance(value, int):
        return tirx.const(value, "int64")
    return value if str(value.ty.dtype) == "int64" else T.cast(value, "int64")


def ceil_div(a: Any, b: int) -> Any:
    """`a / b` rounded up, for ints and for int64 expressions that are not negative."""
    return -(-a // b) if isinstance(a, int) else T.truncdiv(a + (b - 1), tirx.const(b, "int64"))


def div(a: Any, b: int) -> Any:
    """`a / b` for int32 a >= 0."""
    return a // b if isinstance(a, int) else T.truncdiv(a, tirx.const(b, str(a.ty.dtype)))


def mod(a: Any, b: int) -> Any:
    """`a % b` for int32 a >= 0."""
    return a % b if isinstance(a, int) else T.truncmod(a, tirx.const(b, str(a.ty.dtype)))


def get(buffer: Any, index: Any) -> Any:
    """One element."""
    return tirx.BufferLoad(buffer, [index])


def put(buffer: Any, index: Any, value: Any) -> None:
    """Write one element."""
    T.buffer_store(buffer, value, [index])


def at(buffer: Any, index: Any) -> Any:
    """The address of an element."""
    return T.address_of(tirx.BufferLoad(buffer, [index]))


def local(count: int, dtype: str = "float32") -> Any:
    """A thread's own array: registers where all indices are constant after unrolling."""
    return T.alloc_buffer((count,), dtype, scope="local", layout=None)


def shared(count: int, dtype: str = "float32") -> Any:
    """An array of the block."""
    return T.alloc_buffer((count,), dtype, scope="shared", layout=None)


def shared_dynamic(count: int, dtype: str = "uint8") -> Any:
    """The block's one array of dynamic shared memory (more than 48 KiB)."""
    return T.alloc_buffer((count,), dtype, scope="shared.dyn", layout=None)


def call(function: str, *arguments: Any) -> None:
    """Call a device function without a result."""
    T.evaluate(T.call_extern("void", function, *[_argument(a) for a in arguments]))


def value(dtype: str, function: str, *arguments: Any) -> Any:
    """The result of a device function, computed once, here."""
    return T.Bind(T.call_extern(dtype, function, *[_argument(a) for a in arguments]))


def _argument(a: Any) -> Any:
    if isinstance(a, float):
        return T.float32(a)
    if isinstance(a, int):
        return tirx.const(a, "int32") if a < 2**31 else tirx.const(a, "uint32")
    return a


def bind(expression: Any) -> Any:
    """Name a value, so that it is computed once."""
    return expression if isinstance(expression, int) else T.Bind(expression)


def sync() -> None:
    """Barrier of the block."""
    call("iso_sync")


def loop(begin: Any, end: Any) -> Any:
    """`for (int i = begin; i < end; ++i)`, int32."""
    return T.serial(narrow(begin), narrow(end))


def equal(a: Any, b: int) -> Any:
    """`a == b` as a condition."""
    return tirx.EQ(a, tirx.const(b, str(a.ty.dtype)))


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """`if (condition)`; nothing to test where the condition is a Python bool and true."""
    if condition is True:
        yield
        return
    with T.If(tirx.const(0, "bool") if condition is False else condition), T.Then():
        yield


def strided(tx: Any, threads: int, count: int) -> Iterator[tuple[Any, Any]]:
    """Python iteration over a block's share of `count` items: (index, whether it is below count)."""
    for first in range(0, count, threads):
        yield tx + first, True if first + threads <= count else tx + first < count
