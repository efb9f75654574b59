"""Kernels with one block for each row of activations: norms, quantizers, Hadamard transforms, and all of them at once.

    t = x + residual                    (norm; written as `sum`)
    y = normalized t * weight + bias    (norm)
    v = ((y - shift) * scale) H         (quantizers and `hadamard`)
    u, (s, z) = codes of v              (quantizers), bit for bit the formula of docs/dialect.md; two to a byte as
                                        `cache_packing` says where they are packed; of FP8 a scale alone

The row stays in shared memory between the steps. H is applied there: a power of two in stages of butterflies, a core
as a small matrix product along its axis, its sums in registers, so that one copy of the row is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import ceil_to
from ....compiler.dialect.quantization import LEAST_SCALE
from ....compiler.dialect.quantization_fp8 import LARGEST
from ....compiler.errors import UnsupportedError
from ....compiler.hadamard_orders import is_power_of_two, signs
from .builder import (
    Frame,
    Size,
    Tensor,
    bind,
    div,
    equal,
    get,
    launch,
    local,
    loop,
    mod,
    put,
    shared,
    shared_dynamic,
    strided,
    sync,
    value,
    when,
    wide,
)

ROW_LIMIT = 40_000
"""Longest row in floats: what fits the shared memory of sm_80."""


@dataclass(frozen=True)
class Rows:
    """One kernel of this family.

    norm: kind of norm or None. sum, y, transformed: which float results are written. codes: pairs of the quantizer,
    or None. fp8: codes of E4M3 instead of `bits`. orders: of the Hadamard transform. nibbles: two codes to a byte, of
    elements 16 apart. block: threads, 0: chosen for the row.
    """

    rows: Size
    k: int
    norm: Literal["layer", "rms"] | None = None
    eps: float = 0.0
    residual: bool = False
    weight: bool = False
    bias: bool = False
    sum: bool = False
    y: bool = False
    shift: bool = False
    scale: bool = False
    orders: tuple[int, ...] = ()
    transpose: bool = False
    transformed: bool = False
    codes: Literal["dynamic", "static"] | None = None
    bits: int = 8
    align: int = 1
    nibbles: bool = False
    block: int = 0
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.k > ROW_LIMIT:
            raise UnsupportedError(
                "A row of activations is too long for one block",
                expected=f"at most {ROW_LIMIT}",
                got=str(self.k),
            )

    @property
    def kp(self) -> int:
        """Codes of a row."""
        return ceil_to(self.k, self.align)

    @property
    def threads(self) -> int:
        """Threads of a block: eight elements each where the row is long enough."""
        return self.block or min(512, max(64, ceil_to(-(-self.k // 8), 32)))

    @property
    def name(self) -> str:
        """The kernel's name."""
        there = (
            self.residual,
            self.weight,
            self.bias,
            self.sum,
            self.y,
            self.shift,
            self.scale,
            self.transpose,
        )
        flags = "".join(letter for letter, is_there in zip("rwbsyfvt", there, strict=True) if is_there)
        parts = ["rows", self.norm, str(self.k), flags, *(f"h{o}" for o in self.orders)]
        if self.norm:
            parts.append(f"e{self.eps:g}")
        if self.codes:
            kind = "f8" if self.fp8 else str(self.bits)
            parts.append(f"q{kind}{self.codes[0]}{self.kp}{'n' if self.nibbles else ''}")
        return "_".join(p for p in parts if p).replace("-", "m").replace(".", "p").replace("+", "")

    @property
    def cores(self) -> list[int]:
        """Orders that are no power of two."""
        return [order for order in self.orders if not is_power_of_two(order)]

    def inputs(self) -> list[Tensor]:
        """Arguments that are read."""
        vector, whole = (self.k,), (self.rows, self.k)
        found = [("x", whole, True), ("residual", whole, self.residual), ("weight", vector, self.weight)]
        found += [("bias", vector, self.bias), ("shift", vector, self.shift), ("scale", vector, self.scale)]
        found.append(("pair", (1 if self.fp8 else 2,), self.codes == "static"))
        tensors = [Tensor(name, shape, "float32") for name, shape, there in found if there]
        return tensors + [Tensor(f"core{order}", (order * order,), "int8") for order in self.cores]

    def outputs(self) -> list[Tensor]:
        """Arguments that are written."""
        whole = (self.rows, self.k)
        found = [("sum", self.sum), ("y", self.y), ("transformed", self.transformed)]
        tensors = [Tensor(name, whole, "float32") for name, there in found if there]
        if self.codes:
            tensors.append(Tensor("u", (self.rows, self.kp // 2 if self.nibbles else self.kp), "uint8"))
        if self.codes == "dynamic":
            tensors.append(Tensor("params", (self.rows, 1 if self.fp8 else 2), "float32"))
        return tensors

    def constants(self) -> dict[str, np.ndarray[Any, Any]]:
        """Tables of the cores: entry [i, j] is H[i, j], or H[j, i] where transposed."""
        tables = {order: np.array(signs(order), dtype=np.int8) for order in self.cores}
        return {f"core{o}": (t.T if self.transpose else t).reshape(-1).copy() for o, t in tables.items()}

    # -- the body

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        with launch([frame.size(self.rows)], self.threads) as ((row,), tx):
            memory = shared_dynamic(4 * self.k)
            line = T.decl_buffer((self.k,), "float32", data=memory.data, scope="shared.dyn", layout=None)
            start = bind(wide(row) * self.k)
            if self.norm:
                self._normalize(frame, line, start, tx)
            else:
                self._each(
                    tx, lambda i: put(line, i, self._affine(frame, get(frame["x"], start + wide(i)), i))
                )
            if self.orders:
                sync()
                self._hadamard(frame, line, tx)
            if self.transformed:
                self._each(tx, lambda i: put(frame["transformed"], start + wide(i), get(line, i)))
            if self.codes:
                self._quantize(frame, line, row, tx)

    def _each(self, tx: Any, body: Callable[[Any], None]) -> None:
        """`body(i)` for the thread's elements of the row."""
        with loop(0, -(-self.k // self.threads)) as turn:
            i = bind(turn * self.threads + tx)
            with when(True if self.k % self.threads == 0 else i < self.k):
                body(i)

    def _affine(self, frame: Frame, v: Any, i: Any) -> Any:
        v = v - get(frame["shift"], i) if self.shift else v
        return v * get(frame["scale"], i) if self.scale else v

    def _block(self, cell: Any, tx: Any, how: str) -> Any:
        """`sum` or `max` of a value over the block."""
        warps = self.threads // 32
        board = shared(warps)
        warp = value("float32", f"iso_warp_{how}", get(cell, 0))
        with when(equal(mod(tx, 32), 0)):
            put(board, div(tx, 32), warp)
        sync()
        total = get(board, 0)
        for i in range(1, warps):
            total = total + get(board, i) if how == "sum" else T.max(total, get(board, i))
        return bind(total)

    def _normalize(self, frame: Frame, line: Any, start: Any, tx: Any) -> None:
        cell = local(1)
        put(cell, 0, T.float32(0))

        def read(i: Any) -> None:
            v = get(frame["x"], start + wide(i))
            v = bind(v + get(frame["residual"], start + wide(i)) if self.residual else v)
            put(line, i, v)
            if self.sum:
                put(frame["sum"], start + wide(i), v)
            put(cell, 0, get(cell, 0) + (v if self.norm == "layer" else v * v))

        self._each(tx, read)
        total = self._block(cell, tx, "sum")
        mean = bind(total / T.float32(self.k)) if self.norm == "layer" else T.float32(0)
        if self.norm == "layer":
            put(cell, 0, T.float32(0))

            def deviate(i: Any) -> None:
                v = bind(get(line, i) - mean)
                put(cell, 0, get(cell, 0) + v * v)

            self._each(tx, deviate)
            total = self._block(cell, tx, "sum")
        inverse = bind(
            T.float32(1) / value("float32", "sqrtf", total / T.float32(self.k) + T.float32(self.eps))
        )

        def write(i: Any) -> None:
            y = (get(line, i) - mean) * inverse if self.norm == "layer" else get(line, i) * inverse
            y = y * get(frame["weight"], i) if self.weight else y
            y = bind(y + get(frame["bias"], i) if self.bias else y)
            if self.y:
                put(frame["y"], start + wide(i), y)
            put(line, i, self._affine(frame, y, i))

        self._each(tx, write)

    def _hadamard(self, frame: Frame, line: Any, tx: Any) -> None:
        inner = int(np.prod(self.orders))
        factor = inner**-0.5
        for order in self.orders:
            inner //= order
            if is_power_of_two(order):
                self._butterflies(line, order * inner, inner, tx)
            else:
                self._core(frame[f"core{order}"], line, order, inner, tx)
        self._each(tx, lambda i: put(line, i, get(line, i) * T.float32(factor)))

    def _butterflies(self, line: Any, block: int, inner: int, tx: Any) -> None:
        """Stages of a power of two along the axis of stride `inner`."""
        stride, pairs = inner, self.k // 2
        while stride < block:
            with loop(0, -(-pairs // self.threads)) as turn:
                pair = bind(turn * self.threads + tx)
                with when(True if pairs % self.threads == 0 else pair < pairs):
                    low = bind(div(pair, stride) * (2 * stride) + mod(pair, stride))
                    a, b = bind(get(line, low)), bind(get(line, low + stride))
                    put(line, low, a + b)
                    put(line, low + stride, a - b)
            sync()
            stride *= 2

    def _core(self, table: Any, line: Any, order: int, inner: int, tx: Any) -> None:
        """`y[j] = sum_i x[i] H[i, j]` along the axis of this order."""
        items = list(strided(tx, self.threads, self.k))
        sums = local(len(items))
        for n in range(len(items)):
            put(sums, n, T.float32(0))
        with loop(0, order) as i:
            for n, (index, inside) in enumerate(items):
                with when(inside):
                    base = div(index, order * inner) * (order * inner) + mod(index, inner)
                    sign = T.cast(get(table, i * order + mod(div(index, inner), order)), "float32")
                    put(sums, n, get(sums, n) + get(line, base + i * inner) * sign)
        sync()
        for n, (index, inside) in enumerate(items):
            with when(inside):
                put(line, index, get(sums, n))
        sync()

    def _scale_fp8(self, frame: Frame, line: Any, row: Any, tx: Any) -> Any:
        if self.codes == "static":
            return bind(get(frame["pair"], 0))
        top = local(1)
        put(top, 0, T.float32(0))
        self._each(
            tx, lambda i: put(top, 0, T.max(get(top, 0), value("float32", "iso_magnitude", get(line, i))))
        )
        found = bind(self._block(top, tx, "max") / T.float32(LARGEST))
        s = bind(T.Select(found < T.float32(LEAST_SCALE), T.float32(1), found))
        with when(equal(tx, 0)):
            put(frame["params"], wide(row), s)
        return s

    def _quantize(self, frame: Frame, line: Any, row: Any, tx: Any) -> None:
        if self.fp8:
            inverse = bind(T.float32(1) / self._scale_fp8(frame, line, row, tx))
            sync()  # a thread reads elements of other threads
            self._write_codes(frame, line, row, tx, inverse, None)
            return
        levels = T.float32(2**self.bits - 1)
        if self.codes == "dynamic":
            low, high = local(1), local(1)
            put(low, 0, T.float32(0))
            put(high, 0, T.float32(0))

            def span(i: Any) -> None:
                put(low, 0, T.max(get(low, 0), T.float32(0) - get(line, i)))
                put(high, 0, T.max(get(high, 0), get(line, i)))

            self._each(tx, span)
            below, above = self._block(low, tx, "max"), self._block(high, tx, "max")
            s = bind((above + below) / levels)
            s = bind(T.Select(s >= T.float32(LEAST_SCALE), s, T.float32(1)))
            z = bind(T.min(T.max(value("float32", "rintf", below / s), T.float32(0)), levels))
            with when(equal(tx, 0)):
                put(frame["params"], wide(row) * 2, s)
                put(frame["params"], wide(row) * 2 + 1, z)
        else:
            s, z = bind(get(frame["pair"], 0)), bind(get(frame["pair"], 1))
        inverse = bind(T.float32(1) / s)
        sync()  # a thread reads elements of other threads
        if self.nibbles:
            self._write_nibbles(frame, line, row, tx, inverse, z)
        else:
            self._write_codes(frame, line, row, tx, inverse, z)

    def _code(self, line: Any, index: Any, inverse: Any, z: Any) -> Any:
        """The code of an element, 0 behind the row's end."""
        code = local(1, "uint8")
        put(code, 0, T.uint8(0))
        with when(True if self.k == self.kp else index < self.k):
            if self.fp8:
                put(code, 0, T.cast(value("uint32", "iso_code_e4m3", get(line, index) * inverse), "uint8"))
                return get(code, 0)
            rounded = value("float32", "rintf", get(line, index) * inverse) + z
            clamped = T.min(T.max(rounded, T.float32(0)), T.float32(2**self.bits - 1))
            put(code, 0, T.cast(T.cast(clamped, "int32"), "uint8"))
        return get(code, 0)

    def _write_nibbles(self, frame: Frame, line: Any, row: Any, tx: Any, inverse: Any, z: Any) -> None:
        count = self.kp // 2
        start = bind(wide(row) * count)
        for byte, inside in strided(tx, self.threads, count):
            with when(inside):
                low = bind(div(byte, 16) * 32 + mod(byte, 16))
                codes = [self._code(line, low + 16 * i, inverse, z) for i in range(2)]
                put(frame["u"], start + wide(byte), codes[0] + codes[1] * T.uint8(16))

    def _write_codes(self, frame: Frame, line: Any, row: Any, tx: Any, inverse: Any, z: Any) -> None:
        # Four codes in a row, which become a word.
        words = self.kp // 4 if self.kp % 4 == 0 else 0
        start = bind(wide(row) * self.kp)
        count = words or self.kp
        with loop(0, -(-count // self.threads)) as turn:
            item = bind(turn * self.threads + tx)
            with when(True if count % self.threads == 0 else item < count):
                for j in range(4 if words else 1):
                    index = bind(item * (4 if words else 1) + j)
                    put(frame["u"], start + wide(index), self._code(line, index, inverse, z))
