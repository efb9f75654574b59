"""How a lane reads packed weights (docs/dialect.md): four rows of a panel and a unit of eight inputs at a time.

The four lanes t = 0..3 of a row group read units 4 s + t of step s, 32 inputs together; lanes g = 0..7 read the four
rows 4 (g % 4) .. + 3 of panel g / 4 of a tile of two panels. What a lane reads in a step are `words` registers; a row
of it decodes to two words of signed bytes (times `factor`), or to four words of halves (times `factor`) in pairs of
inputs given by `order`. An index of an input inside a product is free as long as weights and activations agree, which
is why the packed order of bytes needs no shuffling on its way to a tensor core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.element_formats import ElementFormat, element_format
from .builder import at, call, div, get, local, mod, put, value

NATURAL, SPLIT, APART = 0x76543210, 0x75643120, 0x73625140
"""Pairs of inputs, a digit each from the lowest: (0, 1) (2, 3) ..; (0, 2) (1, 3) (4, 6) (5, 7); (0, 4) (1, 5) .."""


def element_bytes(buffer: Any) -> int:
    """Bytes of an element of a buffer."""
    return {"8": 1, "16": 2, "32": 4}[str(buffer.dtype).lstrip("uintfloa")]


@dataclass(frozen=True)
class Layout:
    """A packed layout as a lane reads it.

    name: for names of kernels. words: registers of a step. panel_bytes: bytes of a panel for each 8 inputs. factor:
    power of two on decoded values. passes: products over the same activations (codebooks add up in the accumulators).
    dtype, argument: of the kernel's tensor.
    """

    name: str
    words: int
    panel_bytes: int
    factor: float
    order: int = NATURAL
    passes: int = 1
    dtype: str = "uint8"
    argument: str = "weight"

    def loads(self, unit: Any, quad: Any) -> Iterator[tuple[Any, int]]:
        """(byte offset in the panel, bytes) of each load of a step."""
        raise NotImplementedError

    def read(self, weight: Any, panel: Any, k: int, unit: Any, quad: Any, registers: Any) -> None:
        """Read a lane's step from global memory to registers."""
        done, size = 0, element_bytes(weight)
        for offset, count in self.loads(unit, quad):
            source = at(weight, div(panel * (self.panel_bytes * k // 8) + offset, size))
            call(f"iso_load{count}", at(registers, done), source)
            done += count // 4

    def copy(
        self, weight: Any, panel: Any, k: int, unit: Any, quad: Any, ring: Any, slot: Any, lane: Any
    ) -> None:
        """Start the copies of a lane's step to its own places in shared memory, from `slot` on."""
        size = element_bytes(weight)
        for offset, count in self.loads(unit, quad):
            source = at(weight, div(panel * (self.panel_bytes * k // 8) + offset, size))
            call(f"iso_copy{count}", at(ring, slot + lane * count), source, count)
            slot = slot + 32 * count

    def fetch(self, ring: Any, slot: Any, lane: Any, registers: Any) -> None:
        """Read what :meth:`copy` brought to registers."""
        done = 0
        for _, count in self.loads(0, 0):
            call(f"iso_load{count}", at(registers, done), at(ring, slot + lane * count))
            slot, done = slot + 32 * count, done + count // 4

    @property
    def product_name(self) -> str:
        """The device function that multiplies words of bytes with codes of activations."""
        return "iso_mma_s8u8"

    def unit(self) -> Any:
        """What sums of FP8 products are to be multiplied by."""
        raise NotImplementedError

    def byte_words(self, registers: Any, row: int, unit: Any, out: Any) -> None:
        """A row's unit as two words of signed bytes, or of FP8 codes."""
        raise NotImplementedError

    def halves(self, registers: Any, row: int, unit: Any, out: Any, extra: Any, index: int) -> None:
        """A row's unit as four words of halves. extra: what :meth:`prepare` made; index: of the pass."""
        raise NotImplementedError


@dataclass(frozen=True)
class IntegerLayout(Layout):
    """int8, int4, int3 and int2."""

    bits: int = 8

    def loads(self, unit: Any, quad: Any) -> Iterator[tuple[Any, int]]:
        if self.bits == 8:
            yield unit * 128 + quad * 16, 16
            yield unit * 128 + quad * 16 + 64, 16
        elif self.bits == 4:
            yield unit * 64 + quad * 16, 16
        elif self.bits == 2:
            yield div(unit, 2) * 64 + quad * 16, 16
        else:
            for plane in range(3):
                yield div(unit, 4) * 192 + plane * 64 + quad * 16, 16

    def byte_words(self, registers: Any, row: int, unit: Any, out: Any) -> None:
        word = [get(registers, 4 * i + row) for i in range(self.words // 4)]
        if self.bits in (8, 4):
            call(f"iso_bytes_int{self.bits}", at(out, 0), *word)
        else:
            call(f"iso_bytes_int{self.bits}", at(out, 0), *word, mod(unit, 2 if self.bits == 2 else 4))

    def halves(self, registers: Any, row: int, unit: Any, out: Any, extra: Any, index: int) -> None:
        pair = local(2, "uint32")
        self.byte_words(registers, row, unit, pair)
        call("iso_halves_bytes", at(out, 0), at(pair, 0), get(extra, row))


def integer_layout(bits: int) -> IntegerLayout:
    """The layout of integer weights."""
    words, factor = {8: (8, 1.0), 4: (4, 16.0), 3: (12, 32.0), 2: (4, 64.0)}[bits]
    return IntegerLayout(
        f"int{bits}", words, 16 * bits, factor, bits=bits, dtype="int8" if bits == 8 else "uint8"
    )


@dataclass(frozen=True)
class CodedLayout(Layout):
    """Codes of tables and small floats."""

    form: ElementFormat | None = None
    product: str = ""
    """Of codes with E4M3, `e4m3` or `e5m2`; empty: of halves."""

    def loads(self, unit: Any, quad: Any) -> Iterator[tuple[Any, int]]:
        assert self.form is not None
        if self.form.bits == 4:
            yield unit * 64 + quad * 16, 16
        else:
            steps = self.form.bits // 2
            for i in range(steps):
                yield unit * (32 * steps) + i * 32 + quad * 8, 8

    @property
    def product_name(self) -> str:
        return f"iso_mma_{self.product}"

    def unit(self) -> Any:
        return value("float32", f"iso_unit_{self.product}")

    def byte_words(self, registers: Any, row: int, unit: Any, out: Any) -> None:
        """Codes of 8 bits as they are."""
        for i in range(2):
            parts = [get(registers, 4 * i + 2 * j + row // 2) for j in range(2)]
            put(out, i, value("uint32", "iso_permute", *parts, 0x7632 if row % 2 else 0x5410))

    def halves(self, registers: Any, row: int, unit: Any, out: Any, extra: Any, index: int) -> None:
        form = self.form
        assert form is not None
        if form.bits == 4:
            word = get(registers, row)
            if form.is_table:
                call("iso_halves_table", at(out, 0), word, at(extra, 0))
            else:
                call("iso_halves_e2m1", at(out, 0), word)
            return
        parts = [get(registers, 2 * i + row // 2) for i in range(form.bits // 2)]
        if form.bits == 6:
            low = [value("uint32", "iso_permute", p, 0, 0x4432 if row % 2 else 0x4410) for p in parts]
            call("iso_halves_fp6", at(out, 0), *low, form.mantissa)
            return
        pair = local(2, "uint32")
        self.byte_words(registers, row, unit, pair)
        call(f"iso_halves_e{form.exponent}m{form.mantissa}", at(out, 0), at(pair, 0))


_POWERS = {(2, 1): -14, (4, 3): -8, (5, 2): 0, (3, 2): -12, (2, 3): -14}


def coded_layout(name: str) -> CodedLayout:
    """The layout of a `linear_coded` format."""
    form = element_format(name)
    factor = 1.0 if form.is_table else 2.0 ** _POWERS[form.exponent, form.mantissa]
    order = NATURAL if form.bits > 4 else APART if form.is_table else SPLIT
    return CodedLayout(name, form.bits, 16 * form.bits, factor, order, form=form)


def fp8_layout(name: str) -> CodedLayout:
    """The layout of a `linear_fp8` format: the same bytes, which products take as they are."""
    form = element_format(name)
    return replace(
        coded_layout(name), name=f"{name}_fp8", factor=1.0, product=f"e{form.exponent}m{form.mantissa}"
    )


@dataclass(frozen=True)
class CodebookLayout(Layout):
    """Additive codes: a row's unit is `passes` codes, each a vector of 8 halves in its codebook."""

    code_bytes: int = 1

    def loads(self, unit: Any, quad: Any) -> Iterator[tuple[Any, int]]:
        count = 4 * self.words
        size = 16 if count % 16 == 0 else 8 if count % 8 == 0 else 4
        for i in range(0, count, size):
            yield unit * self.panel_bytes + quad * count + i, size

    def halves(self, registers: Any, row: int, unit: Any, out: Any, extra: Any, index: int) -> None:
        byte = (row * self.passes + index) * self.code_bytes
        mask = (1 << 8 * self.code_bytes) - 1
        code = (get(registers, byte // 4) >> T.uint32(8 * (byte % 4))) & T.uint32(mask)
        entry = (T.cast(code, "int32") + index * (mask + 1)) * 8
        call("iso_load16", at(out, 0), at(extra, entry))


def codebook_layout(name: str) -> CodebookLayout:
    """The layout of `linear_codebook`'s format, such as 2x8."""
    count, bits = (int(part) for part in name.split("x"))
    size = bits // 8
    dtype = "uint8" if size == 1 else "uint16"
    return CodebookLayout(
        f"book{name}", count * size, 16 * count * size, 1.0, passes=count, dtype=dtype, code_bytes=size
    )
