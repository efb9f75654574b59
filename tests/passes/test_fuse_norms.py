"""Norms with the sum before and the quantizer behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.passes.fuse_norms import fuse_norms

quantize = torch.ops.isofold.quantize_activation
Count = Callable[[Program], Counter[str]]
X, R = (torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


class Block(nn.Module):
    """A function of x, r and the norm."""

    def __init__(self, body: Callable[..., Any], kind: str = "layer", width: Any = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-3) if kind == "layer" else nn.RMSNorm(width, eps=1e-3)
        self.body = body
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        self.register_buffer("pair", torch.tensor([0.03, 120.0]))

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.body(self, x, r)


def fuse(program: Program) -> tuple[Program, Any]:
    result, (report,) = run_steps(program, [Step(fuse_norms)])
    return result, report


def everything(block: Block, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    total = x + r
    y = block.norm(total)
    return (total, y, *quantize(y, None, 32))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_sum_norm_and_quantizer_are_one(kind: str, text: Any) -> None:
    program = capture(Block(everything, kind), (X, R))
    fused, report = fuse(program)
    assert report.error < 1e-12
    bias = "c" if kind == "layer" else "None"
    assert text(fused) == [
        f"%0 = norm_quantize(x0, x1, c, {bias}, None, 0.001, '{kind}', 32, None, None, 8, [])",
        "%1 = getitem(%0, 2)",
        "%2 = getitem(%0, 3)",
        "%3 = getitem(%0, 0)",
        "%4 = getitem(%0, 1)",
    ]


def test_dynamic_sizes_stay_dynamic() -> None:
    shapes = ({0: Dim("batch", max=64), 1: Dim("length", max=64)},) * 2
    program = capture(Block(everything), (X, R), None, shapes)
    fused, _ = fuse(program)
    x, r = torch.randn(3, 7, 48), torch.randn(3, 7, 48)
    assert relative_error(list(program(x, r))[:2], list(fused(x, r))[:2]) < 1e-5


def test_results_that_nobody_reads_are_not_asked_for(text: Any) -> None:
    fused, report = fuse(capture(Block(lambda b, x, r: b.norm(x)), (X, R)))
    assert report.error < 1e-12
    assert text(fused) == ["%0 = norm(x0, None, c, c, 0.001, 'layer')", "%1 = getitem(%0, 1)"]


def test_static_pairs_are_kept(counts: Count) -> None:
    fused, report = fuse(capture(Block(lambda b, x, r: quantize(b.norm(x), b.pair, 64)), (X, R)))
    assert report.error < 1e-12
    (node,) = [n for n in fused.graph.nodes if n.target == torch.ops.isofold.norm_quantize.default]
    assert argument(node, "params").op == "get_attr"
    assert argument(node, "align") == 64


def test_the_quantizer_with_most_readers_is_taken(counts: Count) -> None:
    def body(b: Block, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        y = b.norm(x)
        u, params = quantize(y, None, 32)
        return (*quantize(y, b.pair, 32), u + 1, u + 2, params)

    fused, report = fuse(capture(Block(body), (X, R)))
    assert report.error < 1e-12
    assert counts(fused)["quantize_activation"] == 1
    (node,) = [n for n in fused.graph.nodes if n.target == torch.ops.isofold.norm_quantize.default]
    assert argument(node, "params") is None
    assert any("another quantizer" in r.reason for r in report.refused)


def test_two_norms_of_one_sum(counts: Count) -> None:
    def body(b: Block, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        total = x + r
        before = total * 2
        return b.norm(total), F.rms_norm(total, (48,), None, 1e-5), before

    fused, report = fuse(capture(Block(body), (X, R)))
    assert report.error < 1e-12
    assert counts(fused)["norm"] == 2
    assert counts(fused)["add"] == 0
    first, second = [n for n in fused.graph.nodes if n.target == torch.ops.isofold.norm.default]
    assert argument(first, "residual") is not None
    assert argument(second, "x").args == (first, 0)


@pytest.mark.parametrize(
    "body",
    [lambda b, x, r: b.norm(x + r[:, :1]), lambda b, x, r: b.norm(torch.add(x, r, alpha=2))],
    ids=["broadcast", "alpha"],
)
def test_other_sums_stay(counts: Count, body: Any) -> None:
    fused, report = fuse(capture(Block(body), (X, R)))
    assert report.error < 1e-12
    assert counts(fused) == {"norm": 1, "getitem": 1, "add": 1} | (
        {"slice": 1} if counts(fused)["slice"] else {}
    )
    assert any("broadcasts" in r.reason for r in report.refused)


def test_taking_a_broadcast_sum_would_be_wrong() -> None:
    """Why the shapes must agree: the operator's results have the shape of x alone."""
    small = R[:, :1]
    exported = torch.export.export(_Small(), (small, X))
    (declared,) = [n.meta["val"] for n in exported.graph.nodes if n.target is torch.ops.isofold.norm.default]
    assert declared[0].shape == small.shape != (small + X).shape


class _Small(nn.Module):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return torch.ops.isofold.norm(x, r, None, None, 1e-5, "layer")[1]


@pytest.mark.parametrize(
    ("module", "dtype", "reason"),
    [
        (Block(lambda b, x, r: b.norm(x), width=(5, 48)), torch.float32, "over the last 2 dimensions"),
        (Block(lambda b, x, r: b.norm(x)).double(), torch.float64, "not float32"),
    ],
    ids=["two dimensions", "float64"],
)
def test_refusals(module: nn.Module, dtype: torch.dtype, reason: str) -> None:
    result = fuse_norms(capture(module, (X.to(dtype), R.to(dtype))))
    assert not result.report.applied
    assert [reason in r.reason for r in result.report.refused] == [True]
