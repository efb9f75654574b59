"""Capture a module, canonicalize it, check that nothing changed in float64, and print what it became."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.program import Program


@dataclass
class Canonical:
    """A canonical program with its text and what was applied and refused."""

    program: Program
    text: str
    applied: list[str]
    refused: list[str]
    error: float


def text_of(program: Program) -> str:
    """One call a line; constants print as `c[shape]`, values as numbers, views and sizes by their own names."""
    names: dict[fx.Node, str] = {}

    def show(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return names[argument]
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(show(a) for a in argument)}]"
        return f"{argument:.7g}" if isinstance(argument, float) else str(argument)

    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif node.op == "get_attr":
            held = program.tensors[str(node.target)]
            names[node] = f"c{list(held.shape)}".replace(" ", "")
        elif node.op == "call_function":
            names[node] = f"%{len(lines)}"
            target = str(node.target).removeprefix("aten.").removesuffix(".default")
            arguments = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
            lines.append(f"%{len(lines)} = {target}({', '.join(arguments)})")
        else:
            lines.append(f"return {show(program.output_node.args[0])}")
    return "\n".join(lines)


@pytest.fixture
def canonical() -> Callable[..., Canonical]:
    """`canonical(module, *args, dynamic_shapes=None)` → Canonical, compared with the captured program in float64."""

    def run(
        module: nn.Module, *args: Tensor, dynamic_shapes: Any = None, tolerance: float = 1e-6
    ) -> Canonical:
        captured = capture(module.eval(), args, dynamic_shapes=dynamic_shapes)
        before = text_of(captured)
        result = canonicalize(captured)
        assert text_of(captured) == before, "the input program was changed"
        error = relative_error(captured.run_float64(), result.program.run_float64())
        assert error < tolerance
        expected, got = module(*args), result.program(*args)
        if isinstance(expected, Tensor):
            rounding = 1e-5 if expected.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)
        return Canonical(
            result.program,
            text_of(result.program),
            [entry.what for entry in result.report.applied],
            [entry.reason for entry in result.report.refused],
            error,
        )

    return run


class Function(nn.Module):
    """A module of a function of its parameters and inputs."""

    def __init__(self, function: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, name) for name in self.names))


@pytest.fixture
def of() -> Callable[..., nn.Module]:
    """`of(function, **tensors)`: a module whose forward is `function(*inputs, *tensors)`."""
    return Function
