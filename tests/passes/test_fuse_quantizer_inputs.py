"""A shift and a scale move into the quantizer that reads them, and stay where that would cost or round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.passes.fuse_norms import fuse_norms
from isofold.passes.fuse_quantizer_inputs import fuse_quantizer_inputs

OPS: Any = torch.ops.isofold
Count = Callable[[Program], Counter[str]]
Body = Callable[["Block", Tensor], Any]


class Block(nn.Module):
    """Constants of 48 channels around a body."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.register_buffer("z", torch.randn(48))
        self.register_buffer("r", torch.rand(48) + 0.5)
        self.register_buffer("pair", torch.tensor([0.02, 120.0]))
        self.register_buffer("column", torch.rand(5, 1))
        self.register_buffer("other", torch.rand(48) + 0.5)
        self.register_buffer("wide", torch.rand(1, 1, 48))
        self.norm = nn.LayerNorm(48)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))


def quantize(x: Tensor, params: Tensor | None = None, bits: int = 8) -> tuple[Tensor, Tensor]:
    u, pair = OPS.quantize_activation(x, params, 32, None, None, bits)
    return u, pair


def fused(body: Body, x: Tensor = X) -> tuple[Program, PassReport, Program]:
    program = capture(Block(body).eval(), (x,))
    after, (report,) = run_steps(program, [Step(fuse_quantizer_inputs)])
    return after, report, program


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("body", "vectors"),
    [
        (lambda b, x: (x - b.z) * b.r, "both"),
        (lambda b, x: b.r * (x - b.z), "both"),
        (lambda b, x: (x + b.z) * 0.375, "both"),
        (lambda b, x: x - b.z, "shift"),
        (lambda b, x: x - 0.25, "shift"),
        (lambda b, x: x * b.wide, "scale"),
        (lambda b, x: OPS.hadamard((x - b.z) * b.r, [12, 4], False), "both"),
        (lambda b, x: OPS.hadamard(x * b.r, [16], False), "scale"),
    ],
)
def test_they_become_arguments_bit_for_bit(
    counts: Count, body: Body, vectors: str, bits: int, static: bool
) -> None:
    after, report, before = fused(lambda b, x: quantize(body(b, x), b.pair if static else None, bits))
    assert report.error == 0
    assert counts(after) == {"quantize_activation": 1, "getitem": 2}
    (node,) = [n for n in after.graph.nodes if n.target == OPS.quantize_activation.default]
    assert (argument(node, "shift") is not None) == (vectors in ("both", "shift"))
    assert (argument(node, "scale") is not None) == (vectors in ("both", "scale"))
    assert argument(node, "bits") == bits
    assert (list(argument(node, "hadamard")) != []) == (counts(before)["hadamard"] == 1)
    assert all(torch.equal(a, b) for a, b in zip(before(X), after(X), strict=True))


def test_all_quantizers_of_one_value_take_them_and_share_the_constants(counts: Count) -> None:
    def body(b: Block, x: Tensor) -> tuple[Tensor, ...]:
        moved = x - b.z
        return (*quantize(moved * b.r), *quantize(moved * b.other, None, 4), *quantize(moved))

    after, report, _ = fused(body)
    assert report.error == 0
    assert counts(after) == {"quantize_activation": 3, "getitem": 6}
    nodes = [n for n in after.graph.nodes if n.target == OPS.quantize_activation.default]
    assert len({argument(n, "shift") for n in nodes}) == 1


REFUSED: list[tuple[Body, dict[str, int], str]] = [
    (lambda b, x: (quantize(x * b.r), x * b.r * 2), {"mul": 1}, "also reads it"),
    (lambda b, x: quantize(x * b.r - b.z), {"mul": 1}, "a scale before the shift"),
    (lambda b, x: quantize(x * b.r * b.z), {"mul": 1}, "the quantizer has a scale already"),
    (
        lambda b, x: quantize(OPS.hadamard(x, [16], False) * b.r),
        {"hadamard": 1},
        "a hadamard before the scale",
    ),
    (lambda b, x: quantize(OPS.hadamard(x, [16], True)), {"hadamard": 1}, "transposed"),
    (lambda b, x: quantize(torch.sub(x, b.z, alpha=2)), {"sub": 1}, "alpha = 2"),
    (lambda b, x: quantize(b.z - x), {"sub": 1}, "subtracts the value from a constant"),
    (lambda b, x: quantize(x * 0.1), {"mul": 1}, "no float32 number"),
    (lambda b, x: quantize(x * b.column), {"mul": 1}, "no vector over the last dimension"),
    (lambda b, x: quantize(x[..., :1] * b.r), {"mul": 1}, "broadcasts"),
]


@pytest.mark.parametrize(("body", "left", "reason"), REFUSED, ids=[r for _, _, r in REFUSED])
def test_refusals(counts: Count, body: Body, left: dict[str, int], reason: str) -> None:
    if "also" in reason:

        def shared(b: Block, x: Tensor) -> tuple[Tensor, ...]:
            y = x * b.r
            return (*quantize(y), y.abs())

        body = shared
    after, report, _ = fused(body)
    assert any(reason in r.reason for r in report.refused), [r.reason for r in report.refused]
    assert counts(after).items() >= left.items()


def test_sums_of_two_values_are_no_shift(counts: Count) -> None:
    after, report, before = fused(lambda b, x: quantize(x + torch.tanh(x)))
    assert not report.applied
    assert not report.refused
    assert counts(after) == counts(before)


def test_a_norm_takes_the_quantizer_with_its_vectors(counts: Count) -> None:
    """Also where y itself is read by another operator, which must not see them (a post-norm residual)."""

    def body(b: Block, x: Tensor) -> tuple[Tensor, ...]:
        y = b.norm(x + torch.tanh(x))
        return (*quantize((y - b.z) * b.r, None, 4), F.relu(y))

    program = capture(Block(body).eval(), (X,))
    after, reports = run_steps(program, [Step(fuse_quantizer_inputs), Step(fuse_norms)])
    assert all((r.error or 0) < 1e-12 for r in reports)
    assert counts(after)["norm_quantize"] == 1
    assert not counts(after).keys() & {"mul", "sub", "quantize_activation", "layer_norm"}
    (node,) = [n for n in after.graph.nodes if n.target == OPS.norm_quantize.default]
    assert [argument(node, name) is not None for name in ("shift", "scale")] == [True, True]
    assert argument(node, "bits") == 4
