"""One use of a dialect operator, as the builders of ONNX function bodies see it.

A builder takes a `Call` and a `Body` and appends the operator's arithmetic in standard ONNX operators. Bodies depend on
which inputs are present, on ranks and static sizes, and on attributes, so each signature has a body of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ...compiler.errors import UnsupportedError
from .body import Body

Results = tuple[ir.Value, ...]
Builder = Callable[["Call", Body], Results]
Decode = Callable[[Body, "Call", int, int], ir.Value]
"""Appends the decoding of a packed weight: `(body, call, rows, k)` gives the float32 matrix `[rows, k]`."""


@dataclass(frozen=True)
class Call:
    """One use of an operator: what its body may depend on.

    inputs: formal inputs by name, None where absent (they carry the dtype and shape of the use).
    attributes: the non-tensor arguments by name.
    """

    inputs: Mapping[str, ir.Value | None]
    attributes: Mapping[str, Any]

    def __getitem__(self, name: str) -> ir.Value:
        """A present input."""
        value = self.inputs[name]
        assert value is not None, f"input {name} is absent"
        return value

    def get(self, name: str) -> ir.Value | None:
        """An input that may be absent."""
        return self.inputs[name]

    def rank(self, name: str) -> int:
        """Number of dimensions of an input."""
        return len(self.dimensions(name))

    def dimensions(self, name: str) -> list[int | None]:
        """Sizes of an input, None where they are not static."""
        shape = self[name].shape
        assert shape is not None, f"input {name} has no shape"
        return [d if isinstance(d, int) else None for d in shape]

    def size(self, name: str, axis: int) -> int:
        """A size that must be static. Raises UnsupportedError."""
        found = self.dimensions(name)[axis]
        if found is None:
            raise UnsupportedError(
                f"Dimension {axis} of {name!r} must have a fixed size to be exported to ONNX",
                hint="only batch and sequence-like dimensions may be dynamic",
            )
        return found
