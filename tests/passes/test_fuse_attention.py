"""Attention without transposes: what cancels, what moves, what stays, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.graph import argument
from isofold.compiler.program import Program
from isofold.passes.fuse_attention import fuse_attention

ATTENTION = torch.ops.isofold.attention.default
BATCH, LENGTH = Dim("batch", max=64), Dim("length", min=2, max=64)


class Attend(nn.Module):
    """Heads from x [B, S, C] by views, an optional change of q and k, attention, and back to [B, S, C]."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 4, change: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.change, self.options = heads, kv_heads, change, options

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = x.view(batch, length, self.heads, -1).transpose(1, 2)
        k = y.view(batch, y.shape[1], self.kv_heads, -1).transpose(1, 2)
        v = k * 0.5 + 1.0
        if self.change is not None:
            q, k = self.change(q), self.change(k)
        out = F.scaled_dot_product_attention(q, k, v, mask, **self.options)
        return out.transpose(1, 2).reshape(batch, length, -1)


def fuse(program: Program) -> tuple[Program, Any]:
    """Canonical form, then the pass, both verified in float64."""
    result, reports = run_steps(program, [Step(canonicalize), Step(fuse_attention)])
    return result, reports[-1]


def the_attention(program: Program) -> torch.fx.Node:
    (node,) = [n for n in program.graph.nodes if n.target == ATTENTION]
    return node


def inputs(queries: int = 5, keys: int = 5, width: int = 32, kv_width: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, queries, width), torch.randn(2, keys, kv_width)


def test_transposes_cancel(text: Callable[[Program], list[str]]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.view(2, 5, 4, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 5, 32)

    program, _ = run_steps(capture(Plain(), (torch.randn(2, 5, 32),)), [Step(canonicalize)])
    assert [line.split(" = ")[1].split("(")[0] for line in text(program)] == [
        "reshape", "transpose", "scaled_dot_product_attention", "transpose", "reshape",
    ]  # fmt: skip
    fused, _ = fuse(program)
    assert text(fused) == [
        "%0 = reshape(x0, [2, 5, 4, 8])",
        f"%1 = attention(%0, %0, %0, None, 4, 4, 0, 0, 0, {1 / math.sqrt(8)!r}, False, 0.0)",
        "%2 = reshape(%1, [2, 5, 32])",
    ]


@pytest.mark.parametrize(
    ("module", "mask"),
    [
        (Attend(is_causal=True), None),
        (Attend(scale=0.3), None),
        (Attend(), torch.rand(2, 1, 5, 5) > 0.4),
        (Attend(), torch.randn(4, 5, 5)),
        (Attend(kv_heads=2, enable_gqa=True), None),
        (Attend(kv_heads=1, enable_gqa=True), None),
    ],
    ids=["causal", "scale", "bool mask", "float mask", "grouped", "one key head"],
)
def test_every_option_keeps_its_meaning(module: Attend, mask: Tensor | None) -> None:
    x, y = inputs(kv_width=8 * module.kv_heads)
    program = capture(module, (x, y) if mask is None else (x, y, mask))
    fused, report = fuse(program)
    assert report.error < 1e-12
    node = the_attention(fused)
    assert argument(node, "kv_heads") == module.kv_heads
    assert argument(node, "causal") == bool(module.options.get("is_causal"))


def test_dynamic_sizes_stay_dynamic() -> None:
    program = capture(
        Attend(), inputs(), None, ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: Dim("keys", min=2, max=64)})
    )
    fused, _ = fuse(program)
    x, y = torch.randn(3, 7, 32), torch.randn(3, 11, 32)
    assert relative_error([program(x, y)], [fused(x, y)]) < 1e-6
    assert not any(n.target == torch.ops.aten.transpose.int for n in the_attention(fused).all_input_nodes[:2])


def test_a_row_that_sees_nothing_is_zero_in_both() -> None:
    x, y = inputs()
    mask = torch.rand(2, 1, 5, 5) > 0.4
    mask[:, :, 2] = False
    program = capture(Attend(), (x, y, mask))
    fused, report = fuse(program)
    assert report.error < 1e-12
    assert fused(x, y, mask)[:, 2].abs().max() == 0.0
    assert program(x, y, mask)[:, 2].abs().max() == 0.0


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * angle.cos() + half * angle.sin()


def test_rotary_norms_and_slices_move_in_front_of_the_transposes(counts: Callable[[Program], Any]) -> None:
    def change(x: Tensor) -> Tensor:
        return F.rms_norm(rotated(x[..., :8]), (8,))

    fused, report = fuse(capture(Attend(heads=2, kv_heads=2, change=change), inputs()))
    assert report.error < 1e-12
    turns = [n for n in fused.graph.nodes if n.target == torch.ops.isofold.rotary.default]
    assert [argument(n, "head_dim_index") for n in turns] == [2, 2]
    assert counts(fused)["rms_norm"] == 2
    query, key, _ = the_attention(fused).args[:3]
    assert {n.target for n in (query, key)} == {torch.ops.aten.rms_norm.default}


def test_hadamard_transforms_and_signs_move_in_front_of_the_transposes(
    counts: Callable[[Program], Any],
) -> None:
    class Turned(Attend):
        def __init__(self) -> None:
            super().__init__(heads=2, kv_heads=2, change=self.turn)
            self.register_buffer("signs", torch.tensor([1.0, -1.0] * 8))

        def turn(self, x: Tensor) -> Tensor:
            turned: Tensor = torch.ops.isofold.hadamard(x * self.signs, [16], False)
            return turned

    fused, report = fuse(capture(Turned(), inputs()))
    assert report.error < 1e-12
    query, key, _ = the_attention(fused).args[:3]
    assert {n.target for n in (query, key)} == {torch.ops.isofold.hadamard.default}
    assert not [
        n for n in (query.args[0].args[0], key.args[0].args[0]) if n.target == torch.ops.aten.transpose.int
    ]


def test_a_factor_of_queries_that_are_keys_too_stays() -> None:
    """Counted once as the operator's scale, the factor of a value read as query and key would be wrong."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = (3.0 * x.view(2, 5, 4, 8)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, scale=0.1).transpose(1, 2)

    fused, report = fuse(capture(Twice(), (torch.randn(2, 5, 32),)))
    assert report.error < 1e-12
    assert argument(the_attention(fused), "scale") == 0.1


def test_other_readers_of_the_old_layout_get_it() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            k = rotated(x.view(2, 5, 4, 8).transpose(1, 2))
            return F.scaled_dot_product_attention(k, k, k).transpose(1, 2), k

    program = capture(Cached(), (torch.randn(2, 5, 32),))
    fused, report = fuse(program)
    assert report.error < 1e-12
    assert fused(*fused.example_args)[1].shape == (2, 4, 5, 8)
    assert sum(n.target == torch.ops.isofold.rotary.default for n in fused.graph.nodes) == 1


def test_the_causal_part_of_a_padding_mask_goes() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            length = x.shape[1]
            q = x.view(x.shape[0], length, 4, 8).transpose(1, 2)
            at = torch.arange(length)
            mask = (at[None, :] <= at[:, None])[None, None] & kept[:, None, None, :]
            return F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2)

    kept = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    shapes = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH})
    fused, report = fuse(capture(Padded(), (torch.randn(2, 5, 32), kept), None, shapes))
    assert report.error < 1e-12
    node = the_attention(fused)
    assert argument(node, "causal") is True
    assert argument(node, "mask").meta["val"].shape[1:3] == (1, 1)


def test_a_mask_that_shifts_the_diagonal_is_not_causal() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            q = x.view(2, 5, 4, 8).transpose(1, 2)
            at = torch.arange(5)
            mask = (at[None, :] <= at[:, None] + 1)[None, None] & kept[:, None, None, :]
            return F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2)

    fused, report = fuse(capture(Shifted(), (torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool))))
    assert report.error < 1e-12
    assert argument(the_attention(fused), "causal") is False


class Direct(nn.Module):
    """Attention on its inputs as they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ops.aten.scaled_dot_product_attention.default(q, k, k, **self.options)


@pytest.mark.parametrize(
    ("module", "q", "k", "reason"),
    [
        (Direct(), (2, 5, 8), (2, 5, 8), "dimensions instead of four"),
        (Direct(dropout_p=0.1), (2, 4, 5, 8), (2, 4, 5, 8), "dropout_p = 0.1"),
        (Direct(), (2, 4, 5, 8), (1, 4, 5, 8), "are broadcast"),
        (Direct(), (2, 4, 5, 8), (2, 4, 5, 8), "not float32"),
    ],
    ids=["rank", "dropout", "batch", "dtype"],
)
def test_refusals(module: Direct, q: tuple[int, ...], k: tuple[int, ...], reason: str) -> None:
    dtype = torch.float64 if reason == "not float32" else torch.float32
    program = capture(module, (torch.randn(q, dtype=dtype), torch.randn(k, dtype=dtype)))
    result = fuse_attention(program)
    assert not result.report.applied
    (refused,) = result.report.refused
    assert reason in refused.reason


def test_layouts_that_are_not_transposed_get_a_transpose(counts: Callable[[Program], Any]) -> None:
    fused, report = fuse(capture(Direct(), (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8))))
    assert report.error < 1e-12
    assert report.applied[0].facts["transposes_left"] == 4
    assert counts(fused)["transpose"] == 4
