"""GPTQ: less error at the output than rounding to nearest, on the same scales; nothing gained where nothing can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isofold.compiler.capture import capture
from isofold.compiler.dialect.packing import code_range, pack_linear
from isofold.compiler.errors import InputError
from isofold.compiler.recipe import ActivationFormat, LayerRule, Recipe, WeightFormat
from isofold.passes.quantize_activations import quantize_activations
from isofold.passes.quantize_weights import quantize_weights
from isofold.passes.ranges import QuantizedMatrix, dequantized, quantize_matrix
from isofold.passes.solve_gptq import Read, input_products, solve_gptq

GPTQ = WeightFormat(bits=4, solver="gptq")


def correlated(rows: int, k: int, seed: int) -> Tensor:
    """Inputs whose covariance is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.logspace(0, -1.5, k)[:, None]
    return torch.randn(rows, k, generator=generator) @ mixing


def nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> QuantizedMatrix:
    return quantize_matrix(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, search="mse", storable=True
    )


def error(found: QuantizedMatrix, group_size: int, weight: Tensor, x: Tensor) -> float:
    moved = dequantized(found, group_size).double() - weight.double()
    return float((x.double() @ moved.mT).square().sum())


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 12),
    k=st.integers(2, 160),
    form=st.sampled_from([(b, g) for b in (2, 3, 4, 8) for g in (0, 32, 64) if g or b >= 4]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_are_in_range_on_the_same_scales_and_pack(
    n: int, k: int, form: tuple[int, int], symmetric: bool, seed: int
) -> None:
    bits, group_size = form
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    x = correlated(64, k, seed)
    start = nearest(weight, bits, group_size, symmetric)
    found = solve_gptq(weight, start, x.mT @ x, bits=bits, group_size=group_size)
    low, high = code_range(bits, symmetric)
    assert int(found.codes.min()) >= low
    assert int(found.codes.max()) <= high
    assert torch.equal(found.scale, start.scale)
    pack_linear(found.codes, found.scale, found.zero, bits, group_size)
    moved = (dequantized(found, group_size) - weight).double()
    assert found.error == pytest.approx(float(moved.norm() / weight.double().norm()), rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 0), (4, 32), (3, 32), (2, 64)])
def test_outputs_move_less_than_by_rounding_to_nearest(bits: int, group_size: int, symmetric: bool) -> None:
    """0.38 to 0.63 of its error where this was written; blocks of inputs end inside groups (150 = 128 + 22)."""
    weight = torch.randn(40, 150, generator=torch.Generator().manual_seed(0))
    x = correlated(600, 150, 1)
    start = nearest(weight, bits, group_size, symmetric)
    found = solve_gptq(weight, start, x.mT @ x / len(x), bits=bits, group_size=group_size)
    assert error(found, group_size, weight, x) < 0.8 * error(start, group_size, weight, x)


def test_independent_inputs_of_one_power_leave_nearest_codes() -> None:
    weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(2))
    start = nearest(weight, 4, 32, True)
    found = solve_gptq(weight, start, torch.eye(70) * 3, bits=4, group_size=32)
    assert torch.equal(found.codes, start.codes)


def test_silent_inputs_take_no_part() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    x = correlated(200, 40, 4)
    x[:, ::3] = 0
    start = nearest(weight, 4, 0, True)
    found = solve_gptq(weight, start, x.mT @ x, bits=4, group_size=0)
    assert torch.equal(found.codes[:, ::3], start.codes[:, ::3])
    nothing = solve_gptq(weight, start, torch.zeros(40, 40), bits=4, group_size=0)
    assert torch.equal(nothing.codes, start.codes)


class Two(nn.Module):
    """Two linears, of which the second reads what the first makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_the_recipe_uses_it_where_it_says_so() -> None:
    x = correlated(300, 48, 5)
    program = capture(Two().eval(), (x,))
    recipe = Recipe(
        weights=GPTQ,
        activations=ActivationFormat(mode="dynamic"),
        layers=[LayerRule(match="second", weights=WeightFormat(bits=4))],
    )
    assert recipe.needs_calibration
    active = quantize_activations(program, recipe=recipe).program
    result = quantize_weights(active, recipe=recipe, calibration=[(x,)])
    solvers = {entry.place.module: entry.facts["solver"] for entry in result.report.applied}
    assert solvers == {"first": "gptq", "second": "nearest"}
    plain = quantize_weights(
        active, recipe=recipe.model_copy(update={"weights": WeightFormat(bits=4)}), calibration=None
    ).program

    def distance(candidate: Any) -> float:
        with torch.no_grad():
            return float((candidate(x) - program(x)).square().sum())

    assert distance(result.program) < distance(plain)


def test_products_are_of_what_linears_read() -> None:
    """A weight with two readers is rounded for both; batches end when there are enough rows."""
    x = correlated(20, 48, 6)
    program = capture(Two().eval(), (x,))
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    relu = next(n.name for n in program.graph.nodes if "relu" in n.name)
    found = input_products(program, {"a": [Read(names[-1])], "b": [Read(relu)]}, [(x,), (2 * x,)])
    torch.testing.assert_close(found["a"], 5 * x.mT @ x / 40)
    assert found["b"].shape == (96, 96)


def test_missing_calibration_is_an_error() -> None:
    program = capture(Two().eval(), (torch.randn(4, 48),))
    with pytest.raises(InputError, match="GPTQ, which needs calibration data"):
        quantize_weights(program, recipe=Recipe(weights=GPTQ))


def test_other_formats_have_no_solver() -> None:
    with pytest.raises(ValueError, match="has no solver"):
        WeightFormat(format="nf4", solver="gptq")
