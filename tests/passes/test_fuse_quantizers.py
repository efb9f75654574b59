"""A quantizer with one reader becomes a part of it; all others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.capture import capture
from isofold.compiler.dialect.packing import alignment, pack_linear, storable_scale
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.passes.fuse_quantizers import fuse_quantizers

OPS: Any = torch.ops.isofold
Count = Callable[[Program], Counter[str]]
Body = Callable[["Block", Tensor], Any]
K, N = 48, 20


class Block(nn.Module):
    """A packed linear of 48 inputs and 20 outputs, and constants, around a body."""

    def __init__(self, body: Body, group_size: int = 32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        groups = -(-K // group_size) if group_size else 1
        scale, _ = storable_scale(0.01 + torch.rand(N, groups, generator=g) / 10, group_size)
        codes = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
        matrix = pack_linear(codes, scale, None, 4, group_size)
        self.body, self.group_size, self.multiplier = body, group_size, matrix.scale_multiplier
        for name in ("weight", "scale", "wsum"):
            self.register_buffer(name, getattr(matrix, name))
        self.register_buffer("shift", torch.randn(K, generator=g))
        self.register_buffer("factor", torch.rand(K, generator=g) + 0.5)
        self.register_buffer("bias", torch.randn(N, generator=g))
        self.register_buffer("pair", torch.tensor([0.3, 7.0]))

    def linear(
        self, u: Tensor, params: Tensor, residual: Tensor | None = None, activation: str = "none"
    ) -> Any:
        tensors = (self.weight, self.scale, None, self.wsum, self.bias, residual)
        tail = (N, K, 4, self.group_size, self.multiplier, activation, False)
        return OPS.linear_packed(u, params, *tensors, *tail)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


X = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1))


def fused(body: Body, group_size: int = 32) -> tuple[Program, PassReport, Program]:
    program = capture(Block(body, group_size).eval(), (X,))
    after, (report,) = run_steps(program, [Step(fuse_quantizers)])
    return after, report, program


def quantize(x: Tensor, params: Tensor | None = None, *rest: Any) -> tuple[Tensor, Tensor]:
    u, pair = OPS.quantize_activation(x, params, 32, *rest)
    return u, pair


BODIES: dict[str, Body] = {
    "dynamic": lambda b, x: b.linear(*quantize(x)),
    "static": lambda b, x: b.linear(*quantize(x, b.pair)),
    "vectors and 4 bits": lambda b, x: b.linear(*quantize(x, None, b.shift, b.factor, 4)),
    "hadamard": lambda b, x: b.linear(*quantize(x, b.pair, None, b.factor, 4, [12, 4])),
    "epilogue": lambda b, x: b.linear(*quantize(x), torch.sin(x[..., :N]), "gelu"),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("group_size", [0, 32])
def test_one_reader_takes_its_quantizer_bit_for_bit(counts: Count, body: Body, group_size: int) -> None:
    after, report, before = fused(body, group_size)
    assert report.error == 0
    assert len(report.applied) == 1
    found = counts(after)
    assert found["quantize_linear_packed"] == 1
    assert not found.keys() & {"quantize_activation", "linear_packed", "getitem"}
    assert torch.equal(before(X), after(X))
    assert after.operator_count < before.operator_count
    (old,) = [n for n in before.graph.nodes if n.target == OPS.quantize_activation.default]
    (linear,) = [n for n in before.graph.nodes if n.target == OPS.linear_packed.default]
    (new,) = [n for n in after.graph.nodes if n.target == OPS.quantize_linear_packed.default]
    for name, source in (("pre_shift", "shift"), ("pre_scale", "scale"), ("input_bits", "bits")):
        assert str(argument(new, name)) == str(argument(old, source))
    for name in ("weight", "scale", "bits", "bias", "activation"):
        assert str(argument(new, name)) == str(argument(linear, name))
    assert torch.equal(before(X), OPS.quantize_linear_packed(*arguments_of(after, new)))


def arguments_of(program: Program, node: torch.fx.Node) -> list[Any]:
    """The arguments of a call on the example input."""
    values: dict[torch.fx.Node, Any] = {}
    program.run_observed(values.__setitem__, (X,))
    return [values[a] if isinstance(a, torch.fx.Node) else a for a in node.args]


def two_linears(b: Block, x: Tensor) -> Any:
    codes = quantize(x)
    return b.linear(*codes), b.linear(*codes, None, "relu")


def mixed(b: Block, x: Tensor) -> Any:
    return b.linear(quantize(x)[0], quantize(x, None, b.shift)[1])


REFUSED: list[tuple[Body, int, str]] = [
    (two_linears, 1, "2 operators read its codes, and each would have to quantize"),
    (lambda b, x: quantize(x), 1, "the program returns its codes"),
    (lambda b, x: quantize(x)[0] + 1, 1, "reads its codes, and has no form with a quantizer inside"),
    (lambda b, x: (lambda u, p: (b.linear(u, p), p))(*quantize(x)), 1, "2 operators read its codes"),
    (mixed, 2, "its codes with other pairs, or its pairs with other codes"),
]


@pytest.mark.parametrize(("body", "left", "reason"), REFUSED, ids=[r for _, _, r in REFUSED])
def test_refusals(counts: Count, body: Body, left: int, reason: str) -> None:
    after, report, before = fused(body)
    assert not report.applied
    assert len(report.refused) == left
    assert all(reason in r.reason for r in report.refused), [r.reason for r in report.refused]
    assert counts(after) == counts(before)


def test_the_padding_of_the_codes_may_be_wider_than_one_group(counts: Count) -> None:
    """K = 48 is padded to 64 by both alignments, as pack_linears lets linears with other groups share codes."""
    assert alignment(32) == 32
    after, report, before = fused(lambda b, x: b.linear(*OPS.quantize_activation(x, None, 64)))
    assert report.error == 0
    assert counts(after)["quantize_linear_packed"] == 1
    assert torch.equal(before(X), after(X))
