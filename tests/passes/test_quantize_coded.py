"""quantize_coded and pack_coded_linears: scales, tables, sharing, refusals, and whole models on ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.dialect.element_formats import FORMATS, decode, scale_values
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import GROUP_SIZES, Fold, LayerRule, Recipe, WeightFormat
from isofold.passes.code_ranges import fitted_table, quantize_codes, relative_error
from isofold.passes.pack_coded_linears import pack_coded_linears
from isofold.passes.pipeline import plan
from isofold.passes.quantize_coded import quantize_coded
from isofold.passes.quantize_weights import quantize_weights

OPS: Any = torch.ops.isofold
ERROR = {
    "nf4": 0.1, "table4": 0.1, "e4m3": 0.03, "e5m2": 0.06, "mxfp4": 0.13, "mxfp6_e3m2": 0.06,
    "mxfp6_e2m3": 0.04, "mxfp8_e4m3": 0.03, "mxfp8_e5m2": 0.06, "nvfp4": 0.11,
}  # fmt: skip
"""Relative error of normally distributed weights, which depends on the format alone."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe(name: str, **more: Any) -> Recipe:
    return Recipe(weights=WeightFormat(format=name, **more))


def compressed(program: Program, chosen: Recipe) -> tuple[Program, dict[str, PassReport]]:
    options = {"recipe": chosen}
    steps = [Step(quantize_coded, options), Step(quantize_weights, options), Step(pack_coded_linears)]
    program, reports = run_steps(program, steps)
    return program, {r.name: r for r in reports}


def count(program: Program, target: Any) -> int:
    return sum(n.target == target for n in program.graph.nodes)


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_that_of_the_format_and_a_search_never_adds_to_it(name: str) -> None:
    weight = normal(48, 256) * torch.logspace(-2, 2, 48)[:, None]
    for group in GROUP_SIZES[name]:
        found = {}
        for search in ("absmax", "mse"):
            matrix = quantize_codes(weight, name, group, search)
            rounded = matrix.dequantized()
            per_row = [relative_error(weight[i], rounded[i]) for i in range(48)]
            found[search] = relative_error(weight, rounded)
            assert max(per_row) < 1.6 * ERROR[name] * (1.3 if group == 128 else 1)
        assert found["mse"] <= found["absmax"] * 1.0005  # storing a float16 scale may add the last digits
        assert 0.3 * ERROR[name] < found["mse"] < ERROR[name] * (1.1 if group == 128 else 1)


def test_mx_scales_are_the_exponents_of_the_specification() -> None:
    weight = torch.tensor([[6.0, 1.0], [7.99, 0.1], [8.0, 3.0], [0.0, 0.0], [2.0**-20, 0.0]])
    matrix = quantize_codes(weight, "mxfp4", 32, "absmax")
    assert (matrix.scale.flatten().int() - 127).tolist() == [0, 0, 1, 0, -22]
    assert matrix.dequantized()[:4].tolist() == [[6, 1], [6, 0], [8, 3], [0, 0]]  # 7.99 saturates


def test_nvfp4_has_a_scale_of_the_tensor_and_one_of_each_16() -> None:
    weight = normal(8, 64) * 3
    weight[0, 0] = 50.0
    matrix = quantize_codes(weight, "nvfp4", 16, "absmax")
    assert matrix.multiplier == pytest.approx(50.0 / (448 * 6))
    assert matrix.scale.shape == (8, 4)
    assert float(scale_values(matrix.scale, FORMATS["nvfp4"], torch.float32)[0, 0]) == 448.0
    assert float(matrix.dequantized()[0, 0]) == pytest.approx(50.0)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_tiny_and_huge_weights_stay_finite(name: str) -> None:
    weight = torch.stack([torch.zeros(64), torch.full((64,), 1e-30), torch.full((64,), -1e30), normal(64)])
    rounded = quantize_codes(weight, name, GROUP_SIZES[name][0], "mse").dequantized()
    assert torch.isfinite(rounded).all()
    assert not rounded[0].any()


def test_a_fitted_table_beats_nf4_on_weights_that_are_not_normal() -> None:
    weight = torch.sign(normal(64, 128)) * (0.5 + 0.5 * torch.rand(64, 128))
    table = fitted_table(weight, 64)
    assert table.shape == (16,)
    assert torch.equal(table, table.sort().values)
    errors = {
        n: relative_error(weight, quantize_codes(weight, n, 64, "mse").dequantized())
        for n in ("nf4", "table4")
    }
    assert errors["table4"] < 0.6 * errors["nf4"]


def test_a_table_of_sixteen_values_is_found_exactly() -> None:
    entries = torch.linspace(-1, 1, 16)
    index = torch.arange(16).repeat(64, 4)
    weight = entries[index]
    assert torch.allclose(fitted_table(weight, 64), entries, atol=1e-6)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(48, 80), nn.Linear(80, 48, bias=False), nn.Linear(48, 80)
        self.head.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("name", FORMATS)
def test_linears_are_quantized_and_packed(name: str) -> None:
    model, x = Mlp().eval(), normal(3, 48)
    packed, reports = compressed(capture(model, (x,)), recipe(name))
    assert count(packed, OPS.linear_coded.default) == 3
    assert count(packed, torch.ops.aten.linear.default) == 0
    error = reports["pack_coded_linears"].error
    assert error is not None
    assert error <= 1e-12
    applied = reports["quantize_coded"].applied
    assert [a.facts["bytes_after"] for a in applied][2] == 0  # the tied weight is stored once
    stored = reports["pack_coded_linears"].applied
    assert [a.facts["bytes_after"] for a in stored[:2]] == [a.facts["bytes_after"] for a in applied[:2]]
    assert applied[0].facts["bytes_after"] < applied[0].facts["bytes_before"] / 2
    assert {a.facts["format"] for a in applied} == {name}
    expected = model(x).detach()
    assert float((packed(x).detach() - expected).norm() / expected.norm()) < 2.5 * ERROR[name]


def test_weights_that_are_not_finite_are_an_error_that_names_every_layer() -> None:
    model = Mlp()
    with torch.no_grad():
        model.b.weight[0, 0] = torch.inf
        model.a.weight[1, :2] = torch.nan
    with pytest.raises(InputError, match=r"where: a .*2 of 3840 values of 'a.weight'; b .*1 of"):
        quantize_coded(capture(model.eval(), (normal(3, 48),)), recipe=recipe("mxfp4"))


def test_rules_mix_formats_and_what_is_refused_says_why() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.small = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(self.b(self.a(x)))

    rules = [LayerRule(match="b", weights=WeightFormat(bits=4, group_size=32))]
    chosen = Recipe(weights=WeightFormat(format="e4m3"), layers=rules)
    captured = capture(Two().eval(), (normal(2, 64),))
    program, reports = run_steps(captured, plan(captured, chosen))
    assert count(program, OPS.linear_coded.default) == count(program, OPS.linear_packed_float.default) == 1
    refused = [r.reason for report in reports for r in report.refused]
    assert any("too small: its weight [1, 64] takes 256 bytes in float" in reason for reason in refused)


class Block(nn.Module):
    """One layer of a decoder: fused queries, keys and values, a gated MLP, residual sums."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.table = nn.Embedding(40, width)
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(hidden, width, bias=False), nn.Linear(width, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.first(x)
        b, t, d = y.shape
        q, k, v = (m(y).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        )
        y = self.second(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 39, 0, 8]])


@pytest.mark.parametrize("name", ["nf4", "table4", "e4m3", "mxfp6_e2m3", "nvfp4"])
def test_linears_that_share_an_input_become_one_where_the_format_allows(name: str) -> None:
    model = Block().eval()
    captured = capture(model, (IDS,))
    program, reports = run_steps(captured, plan(captured, recipe(name)))
    # Queries, keys and values, and gate and up, unless each has a table or a scale of the tensor of its own.
    apart = name in ("nvfp4", "table4")
    assert count(program, OPS.linear_coded.default) == (8 if apart else 5)
    errors = [r.error for r in reports if r.name.startswith(("fuse_", "pack_")) and r.error is not None]
    assert errors
    assert max(errors) < 1e-7  # float32 computes the default epsilon of a norm
    reference = model(IDS).detach()
    assert float((program(IDS) - reference).norm() / reference.norm()) < 2.5 * ERROR[name]


def test_folds_see_the_rounding_of_the_format() -> None:
    model = Block().eval()
    chosen = Recipe(weights=WeightFormat(format="mxfp4"), fold=Fold(scale="awq"))
    captured = capture(model, (IDS,))
    program, _ = run_steps(captured, plan(captured, chosen, calibration=[(IDS,), (IDS.flip(0),)]))
    reference = model(IDS).detach()
    assert count(program, OPS.linear_coded.default) >= 5
    assert float((program(IDS) - reference).norm() / reference.norm()) < 0.3


def test_codes_keep_their_order() -> None:
    weight = torch.linspace(-1, 1, 64)[None].repeat(2, 1)
    matrix = quantize_codes(weight, "nf4", 64, "absmax")
    values = decode(matrix.codes, FORMATS["nf4"], torch.float32)
    assert (values.diff(dim=1) >= 0).all()
