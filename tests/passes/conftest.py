"""Ways to get from a small module to a packed program, and to look at programs as text."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Recipe
from isofold.passes.pack_linears import pack_linears
from isofold.passes.quantize_activations import quantize_activations
from isofold.passes.quantize_weights import quantize_weights


@pytest.fixture
def packed() -> Callable[..., Program]:
    """`packed(module, args, dynamic_shapes=None, recipe="w8a8")` → the canonical program with packed linears."""

    def make(
        module: nn.Module, args: Sequence[Any], dynamic_shapes: Any = None, recipe: str | Recipe = "w8a8"
    ) -> Program:
        chosen = PRESETS[recipe] if isinstance(recipe, str) else recipe
        options = {"recipe": chosen}
        program = capture(module.eval(), tuple(args), None, dynamic_shapes)
        steps = [Step(canonicalize)]
        if chosen.weights is not None:
            if chosen.activations.mode != "float":
                steps.append(Step(quantize_activations, options))
            steps += [Step(quantize_weights, options), Step(pack_linears)]
        return run_steps(program, steps)[0]

    return make


@pytest.fixture
def text() -> Callable[[Program], list[str]]:
    """`text(program)` → one line for each call: its name and arguments, with nodes numbered in order.

    `x0, x1, ...` are inputs, `%0, %1, ...` calls; constants of the program are `c`.
    """

    def spell(program: Program) -> list[str]:
        names: dict[torch.fx.Node, str] = {}
        lines = []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                names[node] = f"x{len([n for n in names.values() if n.startswith('x')])}"
            elif node.op == "get_attr":
                names[node] = "c"
            elif node.op == "call_function":
                given = [_argument(a, names) for a in node.args]
                names[node] = f"%{len(lines)}"
                lines.append(f"{names[node]} = {short_name(node.target)}({', '.join(given)})")
        return lines

    return spell


def _argument(value: Any, names: dict[torch.fx.Node, str]) -> str:
    if isinstance(value, torch.fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    return repr(value)


def short_name(target: Any) -> str:
    """`aten.add.Tensor` → `add`, `isofold.norm.default` → `norm`."""
    if target is operator.getitem:
        return "getitem"
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else str(target)


@pytest.fixture
def counts() -> Callable[[Program], Counter[str]]:
    """`counts(program)` → how often each operator is called."""
    return lambda program: Counter(
        short_name(node.target) for node in program.graph.nodes if node.op == "call_function"
    )
