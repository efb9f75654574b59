"""Heads of one linear: which are joined, in what order, with which bytes, and which stay apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from isofold.compiler.dialect.packing import unpack_weight
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.compiler.recipe import Recipe, WeightFormat
from isofold.passes.fuse_attention import fuse_attention
from isofold.passes.fuse_linears import fuse_linears
from isofold.passes.packed_rows import LINEARS

ATTENTION = torch.ops.isofold.attention.default
WIDTH, DEPTH = 64, 8
Make = Callable[..., Program]


ANGLES = torch.arange(64)[:, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)


def turn(x: Tensor, factor: float = 1.0) -> Tensor:
    """Rotary embedding of `[B, S, H, D]`."""
    angles = ANGLES[: x.shape[1]] * factor
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * angles.cos() + half * angles.sin()


class SelfAttention(nn.Module):
    """q, k, v from three linears, an optional change of each, causal attention, and the merged heads."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 4, changes: tuple[Any, Any, Any] = (None, None, None)
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.changes = heads, kv_heads, changes
        self.q = nn.Linear(WIDTH, heads * DEPTH)
        self.k = nn.Linear(WIDTH, kv_heads * DEPTH, bias=False)
        self.v = nn.Linear(WIDTH, kv_heads * DEPTH)

    def split(self, x: Tensor, y: Tensor) -> list[Tensor]:
        found = []
        for linear, source, count, change in zip(
            (self.q, self.k, self.v),
            (x, y, y),
            (self.heads, self.kv_heads, self.kv_heads),
            self.changes,
            strict=True,
        ):
            heads = linear(source).view(source.shape[0], source.shape[1], count, DEPTH)
            found.append((heads if change is None else change(heads)).transpose(1, 2))
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.split(x, x))


def fuse(program: Program) -> tuple[Program, Any]:
    result, reports = run_steps(program, [Step(fuse_attention), Step(fuse_linears)])
    return result, reports[-1]


def linears(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target in LINEARS]


def the_attention(program: Program) -> torch.fx.Node:
    (node,) = [n for n in program.graph.nodes if n.target == ATTENTION]
    return node


def starts(node: torch.fx.Node) -> list[int]:
    return [argument(node, name) for name in ("q_start", "k_start", "v_start")]


def decoded(program: Program, linear: torch.fx.Node) -> Tensor:
    """The linear's weight as float32."""
    read = (argument(linear, name) for name in ("weight", "scale", "zero"))
    codes, scale, zero = (None if node is None else program.tensors[node.target] for node in read)
    n, k, bits, group, multiplier = (
        argument(linear, name) for name in ("n", "k", "bits", "group_size", "scale_multiplier")
    )
    return unpack_weight(codes, scale, zero, n, k, bits, group, multiplier, torch.float32)


X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def test_three_linears_become_one(packed: Make, text: Callable[[Program], list[str]]) -> None:
    program = packed(SelfAttention(), (X,))
    fused, report = fuse(program)
    lines = text(fused)
    scale = argument(the_attention(fused), "scale")
    assert lines == [
        "%0 = quantize_activation(x0, None, 32, None, None, 8)",
        "%1 = getitem(%0, 0)",
        "%2 = getitem(%0, 1)",
        "%3 = linear_packed(%1, %2, c, c, None, c, c, None, 96, 64, 8, 0, 1.0, 'none', False)",
        "%4 = reshape(%3, [2, 5, 12, 8])",
        f"%5 = attention(%4, %4, %4, None, 4, 4, 0, 4, 8, {scale!r}, True, 0.0)",
        "%6 = reshape(%5, [2, 5, 32])",
    ]
    assert report.error < 1e-12
    assert len(text(program)) - len(lines) >= 5


@pytest.mark.parametrize(
    "weights",
    [
        WeightFormat(),
        WeightFormat(symmetric=False),
        WeightFormat(bits=4, group_size=32),
        WeightFormat(bits=4, group_size=32, symmetric=False),
    ],
    ids=["int8", "int8 zero", "int4", "int4 zero"],
)
@pytest.mark.parametrize("mode", ["dynamic", "float"])
def test_the_weights_are_the_same_numbers(packed: Make, weights: WeightFormat, mode: str) -> None:
    """Rows that do not fill blocks of 16, biases that only some linears have, zeros: bit for bit."""
    recipe = Recipe(name="test", weights=weights, activations={"mode": mode})
    program = packed(SelfAttention(heads=3, kv_heads=1), (X,), None, recipe)
    fused, report = fuse(program)
    assert report.error < 1e-12
    (one,) = linears(fused)
    assert torch.equal(decoded(fused, one), torch.cat([decoded(program, n) for n in linears(program)]))
    assert starts(the_attention(fused)) == [0, 3, 4]


def test_dynamic_sizes_stay_dynamic(packed: Make) -> None:
    shapes = ({0: Dim("batch", max=64), 1: Dim("length", min=2, max=64)},)
    program = packed(SelfAttention(changes=(turn, turn, None)), (X,), shapes)
    fused, _ = fuse(program)
    x = torch.randn(3, 9, WIDTH)
    assert len(linears(fused)) == 1
    assert relative_error([program(x)], [fused(x)]) < 1e-5


def test_turned_heads_come_first_and_turn_together(packed: Make) -> None:
    fused, report = fuse(packed(SelfAttention(heads=4, kv_heads=2, changes=(turn, turn, None)), (X,)))
    assert report.error < 1e-12
    (rotary,) = [n for n in fused.graph.nodes if n.target == torch.ops.isofold.rotary.default]
    assert argument(rotary, "heads") == 6
    assert starts(the_attention(fused)) == [0, 4, 6]
    fused, report = fuse(packed(SelfAttention(changes=(None, turn, None)), (X,)))
    assert report.error < 1e-12
    assert starts(the_attention(fused)) == [4, 0, 8]


def test_turning_one_head_too_many_is_wrong(packed: Make) -> None:
    program = packed(SelfAttention(changes=(turn, turn, None)), (X,))
    fused, _ = fuse(program)
    graph = fused.copy_graph()
    (rotary,) = [n for n in graph.nodes if n.target == torch.ops.isofold.rotary.default]
    rotary.args = (*rotary.args[:4], -1, rotary.args[5])
    wrong = Program(graph, fused.tensors, fused.example_args)
    assert relative_error(program.run_float64(), wrong.run_float64()) > 1e-2


def test_different_tables_stay_apart(packed: Make) -> None:
    changes = (turn, lambda x: turn(x, 0.5), None)
    fused, report = fuse(packed(SelfAttention(changes=changes), (X,)))
    assert len(linears(fused)) == 3
    assert any("turned by different tables" in r.reason for r in report.refused)


def test_cross_attention_joins_keys_and_values(packed: Make) -> None:
    class Cross(SelfAttention):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attend(*self.split(x, y))

    program = packed(Cross(changes=(turn, turn, None)), (X, torch.randn(2, 7, WIDTH)))
    fused, report = fuse(program)
    assert report.error < 1e-12
    assert [argument(n, "n") for n in linears(fused)] == [32, 64]
    assert starts(the_attention(fused)) == [0, 0, 4]


def test_norms_between_keep_queries_and_keys_apart(packed: Make) -> None:
    changes = (lambda x: F.rms_norm(x, (DEPTH,)), lambda x: F.rms_norm(x, (DEPTH,)), None)
    fused, report = fuse(packed(SelfAttention(changes=changes), (X,)))
    assert len(linears(fused)) == 3
    reasons = [r.reason for r in report.refused]
    assert sum("rms_norm" in r and "stands between" in r for r in reasons) == 2
    assert any("do not meet in an attention" in r for r in reasons)


def test_values_that_others_read_stay_apart(packed: Make) -> None:
    class Cached(SelfAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = self.split(x, x)
            return self.attend(q, k, v), k

    program = packed(Cached(), (X,))
    fused, report = fuse(program)
    assert any("keys stay apart" in r.reason and "also reads" in r.reason for r in report.refused)
    assert sorted(argument(n, "n") for n in linears(fused)) == [32, 64]
    assert report.error < 1e-12


class OneLinear(nn.Module):
    """q, k, v from one linear, by a function of its result."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * 4 * DEPTH)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.split(self.qkv(x)))
        return out.transpose(1, 2).flatten(2)


def thirds(y: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.view(2, 5, 4, DEPTH).transpose(1, 2) for t in y.chunk(3, -1))


def inside_heads(y: Tensor) -> tuple[Tensor, ...]:
    return tuple(y.view(2, 5, 4, 3 * DEPTH).transpose(1, 2).chunk(3, -1))


def unbound(y: Tensor) -> tuple[Tensor, ...]:
    return y.reshape(2, 5, 3, 4, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize(
    ("split", "reordered"),
    [(thirds, False), (inside_heads, True), (unbound, False)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_one_linear_that_was_taken_apart(packed: Make, split: Any, reordered: bool) -> None:
    program = packed(OneLinear(split), (X,))
    fused, report = fuse(program)
    assert report.error < 1e-12
    assert report.applied[0].facts["reordered"] == reordered
    targets = [n.target for n in fused.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.slice.Tensor not in targets
    assert torch.ops.aten.transpose.int not in targets
    assert torch.ops.aten.permute.default not in targets


def test_without_the_reordering_the_result_is_wrong(packed: Make) -> None:
    program = packed(OneLinear(inside_heads), (X,))
    fused, _ = fuse(program)
    (before,), (after,) = linears(program), linears(fused)
    tensors = dict(fused.tensors)
    for name in ("weight", "scale", "wsum", "bias"):
        tensors[argument(after, name).target] = program.tensors[argument(before, name).target]
    wrong = Program(fused.graph, tensors, fused.example_args)
    assert relative_error(program.run_float64(), wrong.run_float64()) > 1e-2


def test_scales_too_far_apart_for_one_multiplier_are_refused(packed: Make) -> None:
    module = SelfAttention()
    with torch.no_grad():
        module.k.weight *= 1e-9
        module.v.weight *= 1e-9
    recipe = Recipe(name="test", weights=WeightFormat(bits=4, group_size=32), activations={"mode": "dynamic"})
    fused, report = fuse(packed(module, (X,), None, recipe))
    assert len(linears(fused)) == 3
    assert any("too far apart for one float16 multiplier" in r.reason for r in report.refused)
