"""A dialect operator on the GPU: the kernels it takes, and what passes between them.

An emitter (`operators.py`) gets a :class:`Call`, shapes and attributes only, and answers with a :class:`Plan`: stages
in their order, each one TIR function that reads named tensors and writes new ones. Names are those of the operator's
schema, of constants the plan brings (tables), and of tensors that earlier stages wrote. Kernels see flattened views
of the operator's tensors (`[..., K]` as `[m, K]`), in `views`; a size that is not known when compiling is a symbol of
the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import tirx

from .builder import Size, Tensor

Dimension = Any
"""An int, or an int64 expression of TVM."""


@dataclass(frozen=True)
class Operand:
    """A tensor argument of an operator."""

    shape: tuple[Dimension, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One use of an operator: tensors by the names of the schema (absent: None), and its other arguments.

    wanted: results that somebody reads, by position (None: all).
    """

    operands: Mapping[str, Operand | None]
    attributes: Mapping[str, Any]
    wanted: frozenset[int] | None = None

    def __getitem__(self, name: str) -> Operand:
        found = self.operands[name]
        assert found is not None, name
        return found

    def has(self, name: str) -> bool:
        """Whether an optional tensor is there."""
        return self.operands.get(name) is not None

    def wants(self, result: int) -> bool:
        """Whether a result is read."""
        return self.wanted is None or result in self.wanted


@dataclass(frozen=True)
class Stage:
    """A TIR function, what it reads (in the order of its arguments), and what it writes (its last arguments)."""

    function: tirx.PrimFunc
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.function.attrs["global_symbol"])


@dataclass
class Plan:
    """Everything an operator runs on the GPU.

    results: names of the operator's results; a name that no stage writes is an argument handed through, None a result
    nobody asked for. views: shapes under which the stages read the operator's tensors; `x@rows` is another view of x.
    """

    views: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    symbols: dict[str, Dimension] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    results: tuple[str | None, ...] = ()

    def size(self, name: str, value: Dimension) -> Size:
        """`value` where it is known now, else the symbol `name` for it."""
        if isinstance(value, tirx.IntImm):
            value = int(value)
        if isinstance(value, int):
            return value
        self.symbols[name] = value
        return name

    def rows(self, operand: Operand, name: str = "m", keep: int = 1, parts: int = 1) -> Size:
        """The product of all dimensions but the last `keep`, and of the parts that those are cut into."""
        return self.size(name, math.prod(operand.shape[: len(operand.shape) - keep]) * parts)

    def view(self, name: str, *shape: Size) -> str:
        """Read an argument under this shape."""
        self.views[name] = shape
        return name

    def flat(self, call: Call, *names: str) -> None:
        """Read arguments of static shape, where they are there, as one dimension."""
        for name in names:
            if call.has(name):
                self.views[name] = (math.prod(int(s) for s in call[name].shape),)
