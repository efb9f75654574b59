"""How a warp reads a row of a sparse matrix, by layout (`sparse_packing`): every stored value once, with its input.

    encoding.each(frame, row, lane, body)       # emits body(k, weight) where a lane holds a value of the row

The 32 lanes share a row between them: bits of a word (`bitmask`, `1x4`), values of a window (`windows`), blocks of a
panel (`16x1`, `16x4`), values of a block of groups (`1:4`, `2:4`, `4:8`), the row's bits of eight words (`panels`).
Weights come as int32 (codes) or float32. Values of 0 that a layout stores to fill its blocks are read too; inputs
behind the last are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES, ceil_to
from ....compiler.dialect.sparse_blocks import BLOCKS
from ....compiler.dialect.sparse_groups import BLOCK, GROUPS, block_inputs
from ....compiler.dialect.sparse_packing import WORD
from ....compiler.dialect.sparse_panels import ALIGN
from ....compiler.dialect.sparse_windows import WINDOW
from .builder import Frame, Tensor, at, bind, call, div, get, local, loop, mod, put, value, when, wide

Body = Callable[[Any, Any], None]
"""Emits what is done with an input (int32) and its weight."""


@dataclass(frozen=True)
class Encoding:
    """A stored matrix of `packed` rows and k inputs; sizes: elements of places, values and offsets.

    stored: type of the values' tensor: float32, uint16 (bfloat16), int8, or uint8 (int4).
    """

    layout: str
    stored: str
    packed: int
    k: int
    sizes: tuple[int, int, int]

    @property
    def codes(self) -> bool:
        """Whether values are codes."""
        return self.stored in ("int8", "uint8")

    @property
    def tag(self) -> str:
        """A part of kernels' names."""
        value_name = {"uint16": "bf16", "uint8": "int4"}.get(self.stored, self.stored)
        return f"{self.layout.replace(':', 'of')}_{value_name}"

    def tensors(self) -> list[Tensor]:
        """Arguments of a kernel."""
        places = "uint16" if BLOCKS.get(self.layout, (1, 1))[0] == LANES else "uint8"
        names = (("places", places), ("values", self.stored), ("offsets", "int32"))
        return [Tensor(name, (size,), dtype) for (name, dtype), size in zip(names, self.sizes, strict=True)]

    def each(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """Emit `body` for the lane's values of a packed row."""

        def inside(k: Any, weight: Any) -> None:
            with when(k < self.k):
                body(k, bind(weight))

        if self.layout == "windows":
            self._windows(frame, row, lane, inside)
        elif self.layout in GROUPS:
            self._groups(frame, row, lane, inside)
        elif self.layout == "panels":
            self._words(frame, row, lane, inside)
        elif BLOCKS.get(self.layout, (1, 1))[0] == LANES:
            self._panels(frame, row, lane, inside)
        elif self.stored == "uint8":
            self._nibbles(frame, row, lane, inside)
        else:
            self._bits(frame, row, lane, inside)

    def _value(self, frame: Frame, index: Any) -> Any:
        """A value that takes whole bytes."""
        found = get(frame["values"], index)
        if self.stored == "uint16":
            return value("float32", "__int_as_float", T.cast(found, "int32") << T.int32(16))
        return T.cast(found, "int32") if self.stored == "int8" else found

    def _nibble(self, frame: Frame, index: Any, rank: Any) -> Any:
        """The code in the byte at `index`: in its low nibble where `rank` is even."""
        byte = T.cast(get(frame["values"], index), "int32")
        nibble = (byte >> (mod(rank, 2) * 4)) & T.int32(15)
        return T.bitwise_xor(nibble, T.int32(8)) - 8

    def _four(self, frame: Frame, index: Any, k: Any, body: Body) -> None:
        """Four codes in a row, of inputs from k on."""
        word = local(1, "uint32")
        call("iso_load4", at(word, 0), at(frame["values"], index))
        for j in range(4):
            body(bind(k + j), value("int32", "iso_signed_byte", get(word, 0), j))

    def _bits(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """`bitmask` and `1x4`: a lane is a bit of a 32-bit word, its value at the number of ones below it."""
        width = BLOCKS.get(self.layout, (1, 1))[1]
        words = 2 * ceil_to(-(-self.k // width), WORD) // WORD
        place = local(1, "int32")
        put(place, 0, get(frame["offsets"], row))
        with loop(0, -(-self.k // (32 * width))) as word:
            bits = local(1, "uint32")
            call("iso_load4", at(bits, 0), at(frame["places"], wide(row) * (4 * words) + wide(word * 4)))
            with when(_bit(get(bits, 0), lane) > 0):
                index = bind(get(place, 0) + value("int32", "iso_rank", get(bits, 0), lane))
                k = bind((word * 32 + lane) * width)
                if width == 4:
                    self._four(frame, wide(index) * 4, k, body)
                else:
                    body(k, self._value(frame, index))
            put(place, 0, get(place, 0) + value("int32", "iso_ones", get(bits, 0)))

    def _nibbles(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """`bitmask` of int4: the values of a 64-bit word begin at a byte; a lane is a bit of either half."""
        words = ceil_to(self.k, WORD) // WORD
        place = local(1, "int32")
        put(place, 0, get(frame["offsets"], row))
        with loop(0, words) as word:
            bits = local(2, "uint32")
            call("iso_load8", at(bits, 0), at(frame["places"], (wide(row) * words + wide(word)) * 8))
            ones = [value("int32", "iso_ones", get(bits, i)) for i in range(2)]
            for half in range(2):
                with when(_bit(get(bits, half), lane) > 0):
                    rank = value("int32", "iso_rank", get(bits, half), lane) + (ones[0] if half else 0)
                    rank = bind(rank)
                    code = self._nibble(frame, get(place, 0) + div(rank, 2), rank)
                    body(bind(word * 64 + half * 32 + lane), code)
            put(place, 0, get(place, 0) + div(ones[0] + ones[1] + 1, 2))

    def _words(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """`panels`: a word has four bits of each of 16 rows; codes of a pair's panels are the nibbles of its bytes."""
        words = ceil_to(self.k, ALIGN) // 4
        pair, half, r = bind(div(row, 2 * LANES)), bind(mod(div(row, LANES), 2)), bind(mod(row, LANES))
        place = local(1, "int32")
        put(place, 0, get(frame["offsets"], pair))
        with loop(0, words // 8) as eight:
            span, bits = local(2, "int32"), local(2, "uint32")
            first = bind((wide(pair) * words + wide(eight * 8)) * 16 + wide(half * 8))
            call("iso_panel_words", at(span, 0), at(frame["places"], first), div(lane, 4))
            call("iso_load8", at(bits, 0), at(frame["places"], first + wide(div(lane, 4) * 16)))
            rank = bind(value("int32", "iso_rank64", at(bits, 0), r * 4 + mod(lane, 4)))
            with when(rank >= 0):
                body(bind(eight * 32 + lane), self._nibble(frame, get(place, 0) + get(span, 0) + rank, half))
            put(place, 0, get(place, 0) + get(span, 1))

    def _panels(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """`16x1` and `16x4`: a lane is a block of the row's panel."""
        width = BLOCKS[self.layout][1]
        panel, r = bind(div(row, LANES)), bind(mod(row, LANES))
        begin, end = bind(get(frame["offsets"], panel)), bind(get(frame["offsets"], panel + 1))
        with loop(0, div(end - begin + 31, 32)) as turn:
            block = bind(begin + turn * 32 + lane)
            with when(block < end):
                k = bind(T.cast(get(frame["places"], block), "int32") * width)
                index = wide(block * LANES + r) * width
                if width == 4:
                    self._four(frame, index, k, body)
                else:
                    body(k, self._value(frame, index))

    def _windows(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """`windows`: the counts of a window's 16 rows say where the row's values begin."""
        windows = ceil_to(self.k, WINDOW) // WINDOW
        counts = self.packed * windows
        panel, r = bind(div(row, LANES)), bind(mod(row, LANES))
        place = local(1, "int32")
        put(place, 0, get(frame["offsets"], panel))
        with loop(0, windows) as window:
            span = local(3, "int32")
            call("iso_window", at(span, 0), at(frame["places"], (panel * windows + window) * LANES), r)
            with loop(0, div(get(span, 1) + 31, 32)) as turn:
                i = bind(turn * 32 + lane)
                with when(i < get(span, 1)):
                    index = bind(get(place, 0) + get(span, 0) + i)
                    k = window * WINDOW + T.cast(get(frame["places"], index + counts), "int32")
                    body(bind(k), self._value(frame, index))
            put(place, 0, get(place, 0) + get(span, 2))

    def _groups(self, frame: Frame, row: Any, lane: Any, body: Body) -> None:
        """`1:4`, `2:4` and `4:8`: a lane is two of a block's 64 values."""
        some, of, width = GROUPS[self.layout]
        inputs = block_inputs(self.layout)
        blocks = ceil_to(self.k, inputs) // inputs
        with loop(0, blocks) as number:
            block = bind(wide(row) * blocks + wide(number))
            for half in range(2):
                j = bind(lane + 32 * half)
                index = value("int32", "iso_group_index", at(frame["places"], block * (8 * width)), j, width)
                k = bind(number * inputs + div(j, some) * of + index)
                body(k, self._value(frame, block * BLOCK + wide(j)))


def _bit(word: Any, lane: Any) -> Any:
    return T.cast((word >> T.cast(lane, "uint32")) & T.uint32(1), "int32")
