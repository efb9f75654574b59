"""A small builder for the bodies of model-local functions, in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

OPSET = 21
"""Standard operators of this version: the first with block-wise DequantizeLinear, in ONNX Runtime since 1.18."""


class Body:
    """Nodes of one function, or of the body of a loop in it. `body("Add", x, y)` appends a node and returns its output.

    prefix: of the names of values; a loop's must differ from those around it, which it can read.
    """

    def __init__(self, prefix: str = "") -> None:
        self._tape = Tape()
        self._prefix = prefix

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node with one output; inputs that are absent at the end are left out."""
        given = list(inputs)
        while given and given[-1] is None:  # ONNX Runtime's fusions read a trailing empty name as a value
            given.pop()
        return self._named(self._tape.op(op_type, given, attributes))

    def _named(self, value: ir.Value) -> ir.Value:
        if self._prefix:
            value.name = f"{self._prefix}_{len(self._tape.nodes)}"
        return value

    def constant(self, value: np.ndarray) -> ir.Value:
        """A Constant node."""
        return self._named(self._tape.op("Constant", [], {"value": ir.tensor(value)}))

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def integer(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self.constant(np.array(value, dtype=np.int64))

    def real(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.array(value, dtype=np.float32))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`x` as `dtype`."""
        return self("Cast", x, to=dtype.value)

    def floats(self, x: ir.Value) -> ir.Value:
        """`x` as float32."""
        return self.cast(x, ir.DataType.FLOAT)

    def reshape(self, x: ir.Value, *sizes: int) -> ir.Value:
        """Reshape with ONNX's rules: 0 copies a size, -1 is inferred."""
        return self("Reshape", x, self.ints(*sizes))

    def slice(self, x: ir.Value, start: int, stop: int, axis: int, step: int = 1) -> ir.Value:
        """`x[start:stop:step]` along one axis."""
        return self("Slice", x, self.ints(start), self.ints(stop), self.ints(axis), self.ints(step))

    def transpose(self, x: ir.Value, *order: int) -> ir.Value:
        """Permute dimensions."""
        return self("Transpose", x, perm=order)

    def stack(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Join along a new axis."""
        return self("Concat", *(self("Unsqueeze", v, self.ints(axis)) for v in values), axis=axis)

    def loop(
        self, count: ir.Value, carried: ir.Value, step: Callable[[Body, ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """`count` times `carried = step(body of the loop, number of the turn, carried)`."""
        inner = Body("turn")
        turn, going, before = (
            ir.Value(name=f"turn_{name}", type=ir.TensorType(dtype), shape=shape)
            for name, dtype, shape in (
                ("number", ir.DataType.INT64, ir.Shape([])),
                ("going", ir.DataType.BOOL, ir.Shape([])),
                ("carried", ir.DataType.FLOAT, None),
            )
        )
        after = step(inner, turn, before)
        outputs = [inner("Identity", going), after]
        graph = ir.Graph(
            [turn, going, before],
            outputs,
            nodes=list(inner._tape.nodes),
            opset_imports={"": OPSET},
            name="turn",
        )
        return self("Loop", count, None, carried, body=graph)

    def function(
        self,
        domain: str,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        attributes: Sequence[ir.Attr],
    ) -> ir.Function:
        """The function of all nodes appended so far."""
        declared = [ir.Attr(a.name, a.type, None) for a in attributes]
        graph = ir.Graph(
            list(inputs), list(outputs), nodes=list(self._tape.nodes), opset_imports={"": OPSET}, name=name
        )
        return ir.Function(domain, name, graph=graph, attributes=declared)
