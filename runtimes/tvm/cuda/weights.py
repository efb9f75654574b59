"""Packed weights as arguments of a kernel: layout, groups, scales, and the lane's view of scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES, alignment, ceil_to
from .builder import Frame, Tensor, get, local, put, value
from .epilogue import Linear
from .layouts import CodebookLayout, CodedLayout, IntegerLayout, Layout

Activations = Literal["codes", "fp8", "float"]
"""Unsigned codes with a pair (s, z), codes of E4M3 with a scale, or floats, which kernels round to float16."""


@dataclass(frozen=True)
class Weights:
    """How weights are stored: layout, groups, type of the scales, and steps of the zero points (0: there are none)."""

    layout: Layout
    group_size: int
    scale: Literal["float32", "float16", "e8m0", "e4m3"] = "float16"
    zero_steps: int = 0

    def tensors(self, linear: Linear, kp: int) -> list[Tensor]:
        """Arguments: weight, scale and what else decoding needs."""
        panels = linear.packed // LANES
        groups = kp // self.group_size if self.group_size else 1
        layout = self.layout
        count = panels * layout.panel_bytes * kp // 8 // (2 if layout.dtype == "uint16" else 1)
        stored = self.scale if self.scale.startswith("float") else "uint8"
        found = [
            Tensor(layout.argument, (count,), layout.dtype),
            Tensor("scale", (panels * groups * LANES,), stored),
        ]
        if self.zero:
            found.append(Tensor("zero", (panels * groups * LANES,), "int8"))
        if self.group_size:
            found.append(Tensor("multiplier", (1,), "float32"))
        if isinstance(layout, CodebookLayout):
            found.append(Tensor("codebooks", (layout.passes << 8 * layout.code_bytes << 3,), "float16"))
        if isinstance(layout, CodedLayout) and layout.form is not None and layout.form.is_table:
            found.append(Tensor("table", (16,), "float32"))
        return found

    @property
    def zero(self) -> bool:
        """Whether there are zero points."""
        return self.zero_steps > 0

    @property
    def grouped(self) -> bool:
        """Whether sums are scaled group by group (NVFP4 scales weights instead)."""
        return self.group_size > 0 and self.scale != "e4m3"

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a lane's four rows in one group."""
        return {"float16": 8, "e8m0": 4}.get(self.scale, 0) if self.grouped else 0

    @property
    def offsets(self) -> bool:
        """Whether decoding to halves needs an offset for each row (integers do, with zero points or without)."""
        return isinstance(self.layout, IntegerLayout)

    def padded(self, k: int) -> int:
        """Inputs with padding."""
        return ceil_to(k, alignment(self.group_size))

    def scale_index(self, kp: int, panel: Any, group: Any, quad: Any) -> Any:
        """Index of the first scale (and zero point) of a lane's four rows."""
        return (panel * (kp // self.group_size if self.group_size else 1) + group) * LANES + quad * 4

    def scales(self, words: Any) -> list[Any]:
        """Scales of four rows, float32, from the two words that hold them."""
        if self.scale == "float16":
            halves = [get(words, row // 2) >> T.uint32(16 * (row % 2)) for row in range(4)]
            return [value("float32", "iso_half_to_float", h & T.uint32(0xFFFF)) for h in halves]
        codes = [(get(words, 0) >> T.uint32(8 * row)) & T.uint32(255) for row in range(4)]
        return [value("float32", "iso_e8m0", code) for code in codes]

    def zeros(self, word: Any, activations: Activations) -> Any:
        """Zero points of four rows in decoded steps (int32), or as offsets of halves; word: the four stored bytes."""
        factor = int(self.layout.factor) // (self.zero_steps or 1)
        found = local(4, "int32" if activations == "codes" else "uint32")
        for row in range(4):
            zero = value("int32", "iso_signed_byte", word, row) * factor if self.zero else T.int32(0)
            if activations == "float":
                zero = value("uint32", "iso_half_twice", T.cast(zero + 1152, "float32"))
            put(found, row, zero)
        return found

    def finish(self, frame: Frame, total: Any, row: Any) -> Any:
        """A sum of decoded values with what is not in it yet: a row's scale, or the multiplier of all groups'."""
        factor = T.float32(1.0 if self.scale == "e4m3" else 1.0 / self.layout.factor)
        return total * (get(frame["multiplier"], 0) if self.group_size else get(frame["scale"], row)) * factor

    @property
    def tag(self) -> str:
        """A part of kernels' names."""
        return f"{self.layout.name}g{self.group_size}{'z' if self.zero else ''}"
