"""Epilogues: each rule, their order, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.compiler.recipe import Recipe, WeightFormat
from isofold.passes.fuse_epilogues import fuse_epilogues
from isofold.passes.packed_rows import LINEARS

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
Make = Callable[..., Program]
Count = Callable[[Program], Counter[str]]


class After(nn.Module):
    """A function of a linear's result and of its input."""

    def __init__(
        self, after: Callable[[Tensor, Tensor], Tensor], features: int = 64, bias: bool = True
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(64, features, bias=bias)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x), x)


class ReadTwice(nn.Module):
    """A linear's results with a factor and without one, so that the factor cannot go into the weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(64, 64), factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.factor * self.linear(x) + x, self.linear(x + 1)


def fuse(program: Program) -> tuple[Program, Any]:
    result, (report,) = run_steps(program, [Step(fuse_epilogues)])
    return result, report


def the_linear(program: Program) -> torch.fx.Node:
    (node,) = [n for n in program.graph.nodes if n.target in LINEARS]
    return node


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
    ],
)
@pytest.mark.parametrize("recipe", ["w8a8", "w8a16"])
def test_activation_then_residual(packed: Make, text: Any, name: str, function: Any, recipe: str) -> None:
    program = packed(After(lambda y, x: x + function(y)), (X,), None, recipe)
    fused, report = fuse(program)
    assert report.error < 1e-12
    linear = the_linear(fused)
    assert argument(linear, "activation") == name
    assert argument(linear, "residual").op == "placeholder"
    assert len(text(program)) - len(text(fused)) == 2


def test_golden_text(packed: Make, text: Any) -> None:
    program = packed(After(lambda y, x: F.relu(y) + x), (X,))
    linear = "linear_packed(%1, %2, c, c, None, c, c, {}, 64, 64, 8, 0, 1.0, '{}', False)"
    quantized = [
        "%0 = quantize_activation(x0, None, 32, None, None, 8)",
        "%1 = getitem(%0, 0)",
        "%2 = getitem(%0, 1)",
    ]
    plain = ["%3 = " + linear.format("None", "none"), "%4 = relu(%3)", "%5 = add(%4, x0)"]
    assert text(program) == quantized + plain
    assert text(fuse(program)[0]) == [*quantized, "%3 = " + linear.format("x0", "relu")]


def test_an_activation_of_the_sum_stays(packed: Make, counts: Count) -> None:
    """The operator adds the residual last; taking the activation of a sum would compute another function."""
    program = packed(After(lambda y, x: F.relu(y + x)), (X,))
    fused, report = fuse(program)
    assert report.error < 1e-12
    assert counts(fused)["relu"] == 1
    graph = fused.copy_graph()
    (linear,) = [n for n in graph.nodes if n.target in LINEARS]
    (relu,) = [n for n in graph.nodes if n.target == torch.ops.aten.relu.default]
    linear.args = (*linear.args[:13], "relu", linear.args[14])
    relu.replace_all_uses_with(linear)
    graph.erase_node(relu)
    wrong = Program(graph, fused.tensors, fused.example_args)
    assert relative_error(program.run_float64(), wrong.run_float64()) > 1e-2


def test_of_two_linears_the_later_takes_the_other(packed: Make, counts: Count) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return first + F.gelu(self.b(x)) + x

    fused, report = fuse(packed(Parallel(), (X,)))
    assert report.error < 1e-12
    assert counts(fused)["add"] == 1
    first, second = [n for n in fused.graph.nodes if n.target in LINEARS]
    assert argument(second, "residual") is first


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda y, x: y + x[:, :1], "broadcasts"),
        (lambda y, x: (y + x) * y, "read by 2 operators"),
        (lambda y, x: F.relu(y) * y.sum(), "before the activation"),
        (lambda y, x: torch.add(y, x, alpha=2), "each counted once"),
        (lambda y, x: y + y, "each counted once"),
    ],
    ids=["broadcast", "two readers", "activation", "alpha", "itself"],
)
def test_refusals(packed: Make, after: Any, reason: str) -> None:
    program = packed(After(after), (X,))
    fused, report = fuse(program)
    assert any(reason in r.reason for r in report.refused), report.refused
    assert not report.applied
    assert fused.operator_count == program.operator_count


VECTOR = torch.linspace(-1, 2, 64)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a16"])
@pytest.mark.parametrize("bias", [True, False])
def test_constants_go_into_the_linear(counts: Count, recipe: str, bias: bool, packed: Make) -> None:
    program = _with_constants(packed(After(lambda y, x: y.neg().neg(), bias=bias), (X,), None, recipe))
    fused, report = fuse(program)
    assert 0 < report.error < 1e-6
    assert counts(fused)["mul"] == counts(fused)["add"] == 0
    assert argument(the_linear(fused), "activation") == "silu"


def _with_constants(program: Program) -> Program:
    """Put `silu(0.3 y * VECTOR + VECTOR)` where the program has a pair of negations."""
    from isofold.compiler.editor import Editor

    editor = Editor(program)
    outer = [n for n in editor.graph.nodes if n.target == torch.ops.aten.neg.default][-1]
    y = outer.args[0].args[0]
    c = editor.constant(VECTOR, "vector")
    aten = torch.ops.aten
    for target, other in ((aten.mul.Tensor, 0.3), (aten.mul.Tensor, c), (aten.add.Tensor, c)):
        y = editor.call(target, y, other, like=outer)
    editor.replace(outer, editor.call(aten.silu.default, y, like=outer))
    return editor.finish()


def test_group_scales_take_powers_of_two_only(packed: Make, counts: Count) -> None:
    weights = WeightFormat(bits=4, group_size=32)
    recipe = Recipe(name="test", weights=weights, activations={"mode": "dynamic"})
    for factor, left in ((0.5, 0), (0.3, 1), (-0.5, 1)):
        program = packed(ReadTwice(factor), (X,), None, recipe)
        fused, report = fuse(program)
        assert report.error is None or report.error < 1e-12
        assert counts(fused)["mul"] == left
        assert bool(report.refused) == bool(left)


def test_activation_of_a_packed_convolution(counts: Count) -> None:
    class Convolve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            packed = (
                torch.ones(1, 12, 16, 4, dtype=torch.int8),
                torch.full((1, 1, 16), 0.1),
                torch.full((16,), 4.8),
            )
            y = torch.ops.isofold.conv_packed(
                x, None, *packed, None, [4, 4], [1, 1], [0, 0], [1, 1], 16, "none"
            )
            return F.relu(y)

    fused, report = fuse(capture(Convolve(), (torch.randn(2, 3, 6, 6),)))
    assert report.error == 0.0
    assert counts(fused)["relu"] == 0
