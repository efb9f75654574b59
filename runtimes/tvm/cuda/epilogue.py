"""What follows a product: bias, activation, gating and residual; and what all linears have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....compiler.dialect.activation import ACTIVATIONS
from ....compiler.dialect.linear_packed import packed_rows
from ....compiler.dialect.packing import LANES, ceil_to
from ....compiler.errors import UnsupportedError
from .builder import Frame, Size, Tensor, div, get, mod, put, value, wide


def activated(x: Any, activation: str) -> Any:
    """The named activation of a float32 value."""
    if activation not in ACTIVATIONS:
        raise UnsupportedError("Unknown activation", expected=" | ".join(ACTIVATIONS), got=repr(activation))
    return x if activation == "none" else value("float32", f"iso_{activation}", x)


@dataclass(frozen=True)
class Linear:
    """The shape and the epilogue of a linear: `rows` tokens, k inputs, n outputs.

    outliers: lines of 16 entries beside the weights (`outlier_packing`), whose values are times `outlier_multiplier`.
    """

    rows: Size
    k: int
    n: int
    activation: str
    gated: bool
    bias: bool
    residual: bool
    outliers: int = 0
    outlier_multiplier: float = 1.0

    @property
    def packed(self) -> int:
        """Rows of the packed matrix, padded: a multiple of 16."""
        return ceil_to(packed_rows(self.n, self.gated), LANES)

    @property
    def tag(self) -> str:
        """A part of kernels' names that says all of this but the number of rows."""
        flags = ("g" if self.gated else "") + ("b" if self.bias else "") + ("r" if self.residual else "")
        flags += f"o{self.outliers}" if self.outliers else ""
        return f"{self.n}x{self.k}_{self.activation}{'_' + flags if flags else ''}"

    def tensors(self) -> list[Tensor]:
        """Arguments of the epilogue: bias and residual where they are there, then the result."""
        found = []
        if self.bias:
            found.append(Tensor("bias", (self.packed if self.gated else self.n,), "float32"))
        if self.residual:
            found.append(Tensor("residual", (self.rows, self.n), "float32"))
        return [*found, Tensor("y", (self.rows, self.n), "float32")]

    def entries(self) -> list[Tensor]:
        """The outliers as they are packed, where there are any."""
        if not self.outliers:
            return []
        count = self.outliers * LANES
        return [
            Tensor("places", (count,), "uint16"),
            Tensor("values", (count,), "float16"),
            Tensor("offsets", (self.packed // LANES + 1,), "int32"),
        ]

    def packed_row(self, feature: Any) -> Any:
        """The packed row of an output, that of the gate where rows are interleaved (the up row is 16 further)."""
        if not self.gated:
            return feature
        return div(feature, LANES) * (2 * LANES) + mod(feature, LANES)

    def finish(self, frame: Frame, token: Any, feature: Any, value: Any, up: Any = None) -> None:
        """Write output `feature` of a token: `value` is its sum before the bias (the gate's, with `up` the up
        row's)."""
        row = self.packed_row(feature)
        if self.bias:
            value = value + get(frame["bias"], row)
        result = activated(value, self.activation)
        if self.gated:
            result = result * (up + get(frame["bias"], row + LANES) if self.bias else up)
        index = wide(token) * self.n + wide(feature)
        if self.residual:
            result = result + get(frame["residual"], index)
        put(frame["y"], index, result)
