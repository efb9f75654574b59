"""Gated pairs: the interleaved rows, halves of one linear, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.dialect.packing import interleave_gated, unpack_weight
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.compiler.recipe import Recipe, WeightFormat
from isofold.passes.fuse_gated import fuse_gated
from isofold.passes.packed_rows import LINEARS

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
Make = Callable[..., Program]


class Gated(nn.Module):
    """activation(gate(x)) * up(x), of two linears."""

    def __init__(self, features: int = 24, activation: Any = F.silu) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(64, features), nn.Linear(64, features, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.gate(x)) * self.up(x)


def fuse(program: Program) -> tuple[Program, Any]:
    result, (report,) = run_steps(program, [Step(fuse_gated)])
    return result, report


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu], ids=["silu", "gelu", "relu"])
@pytest.mark.parametrize("features", [16, 24, 3])
@pytest.mark.parametrize("mode", ["dynamic", "float"])
def test_two_linears_become_one(
    packed: Make, counts: Callable[[Program], Counter[str]], features: int, activation: Any, mode: str
) -> None:
    weights = WeightFormat(bits=4, group_size=32, symmetric=features != 24)
    recipe = Recipe(name="test", weights=weights, activations={"mode": mode})
    program = packed(Gated(features, activation), (X,), None, recipe)
    fused, report = fuse(program)
    assert report.error is not None
    assert report.error < 1e-12
    assert counts(fused)["gated"] == 0
    (linear,) = [n for n in fused.graph.nodes if n.target in LINEARS]
    assert argument(linear, "n") == features
    assert argument(linear, "gated") is True

    def weight(of: Program, node: torch.fx.Node, rows: int) -> Tensor:
        read = [argument(node, name) for name in ("weight", "scale", "zero")]
        codes, scale, zero = (None if r is None else of.tensors[r.target] for r in read)
        multiplier = argument(node, "scale_multiplier")
        return unpack_weight(codes, scale, zero, rows, 64, 4, 32, multiplier, torch.float32)

    pair = [weight(program, n, features) for n in program.graph.nodes if n.target in LINEARS]
    both = interleave_gated(*pair)
    assert torch.equal(weight(fused, linear, len(both)), both)


def test_gate_and_up_do_not_commute(packed: Make) -> None:
    program = packed(Gated(16), (X,))
    fused, _ = fuse(program)
    tensors = dict(fused.tensors)
    (linear,) = [n for n in fused.graph.nodes if n.target in LINEARS]
    for name in ("weight", "scale", "wsum", "bias"):
        target = argument(linear, name).target
        tensors[target] = tensors[target].unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    wrong = Program(fused.graph, tensors, fused.example_args)
    assert relative_error(program.run_float64(), wrong.run_float64()) > 1e-2


def test_halves_of_one_linear(packed: Make, counts: Callable[[Program], Counter[str]]) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(64, 48)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return F.silu(gate) * up

    fused, report = fuse(packed(Halves(), (X,)))
    assert report.error < 1e-12
    assert counts(fused) == {"quantize_activation": 1, "getitem": 2, "linear_packed": 1}


class SharedGate(Gated):
    """The gate's linear has another reader."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(x)
        return F.silu(gate) * self.up(x), gate


class TwoInputs(Gated):
    """gate and up read different values."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x + 1)


class NoLinear(Gated):
    """up is no linear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * x[..., :24].cos()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (SharedGate(), "also reads"),
        (TwoInputs(), "read different inputs"),
        (NoLinear(), "up is not the result of a packed linear"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_refusals(packed: Make, module: nn.Module, reason: str) -> None:
    program = packed(module, (X,))
    result = fuse_gated(program)
    assert not result.report.applied
    assert any(reason in r.reason for r in result.report.refused)
    assert result.program.operator_count == program.operator_count
