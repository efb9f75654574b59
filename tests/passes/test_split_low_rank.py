"""A thin float part beside a rounded weight: identity, error, refusals, and the whole way to ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import isofold
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError, RecipeError
from isofold.compiler.frontend import prepare
from isofold.compiler.recipe import Recipe, WeightFormat
from isofold.passes.rounded_weight import rounded_weight
from isofold.passes.split_low_rank import _factors, _split, split_low_rank

FORMATS = {
    "int4": {"bits": 4, "group_size": 32},
    "int3": {"bits": 3, "group_size": 32, "symmetric": False},
    "int8": {"bits": 8},
    "nf4": {"format": "nf4"},
    "mxfp4": {"format": "mxfp4"},
}


def outlying(rows: int, columns: int) -> torch.Tensor:
    """A weight with a few columns and rows that are larger than the rest, as trained ones have."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 3] *= 20
    weight[5] *= 10
    return weight / columns**0.5


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)).eval()
    with torch.no_grad():
        layers[0].weight.copy_(outlying(96, 64))
        layers[2].weight.copy_(outlying(64, 96))
    return layers


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_never_worse_than_making_up_for_the_error_afterwards(name: str) -> None:
    form, weight = WeightFormat.model_validate({**FORMATS[name], "low_rank": 4}), outlying(96, 128)
    found = _split(weight, form)
    rounded = rounded_weight(weight, form).double()
    u, singular, v = torch.linalg.svd(weight.double() - rounded)
    lorc = (weight.double() - rounded - (u[:, :4] * singular[:4]) @ v[:4]).norm() / weight.norm()
    assert found.after <= float(lorc) * 1.001
    assert found.after < found.before


def test_the_factors_are_the_best_of_their_rank() -> None:
    matrix = outlying(48, 80).double()
    codes, scale, up = _factors(matrix, 6)
    assert codes.dtype == torch.int8
    singular = torch.linalg.svdvals(matrix)
    left = (matrix - up.double().T @ (codes.double() * scale.double())).norm()
    assert float(left) == pytest.approx(float(singular[6:].norm()), rel=1e-2)


def test_a_part_without_error_is_zero() -> None:
    codes, scale, up = _factors(torch.zeros(48, 80), 4)
    assert float((up.double().T @ (codes.double() * scale.double())).abs().max()) == 0


def test_the_split_is_exact_over_the_reals_and_deterministic() -> None:
    program = capture(model().double(), (torch.randn(3, 64).double(),))
    single = capture(model(), (torch.randn(3, 64),))
    recipe = Recipe(weights=WeightFormat(bits=4, group_size=32, low_rank=4))
    first, second = (run_steps(single, [Step(split_low_rank, {"recipe": recipe})])[0] for _ in range(2))
    x = torch.randn(7, 64)
    assert torch.allclose(first(x[:3]), single(x[:3]), atol=1e-5)
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)
    # float64 weights are no weights of a packed format: refused, and unchanged.
    left, reports = run_steps(program, [Step(split_low_rank, {"recipe": recipe})])
    assert reports[0].refused[0].reason.startswith("its weight is torch.float64")
    assert torch.equal(left(x[:3].double()), program(x[:3].double()))


def test_dropping_the_thin_part_would_be_seen() -> None:
    form = WeightFormat(bits=4, group_size=32, low_rank=4)
    found = _split(outlying(96, 64), form)
    whole = found.rest.double() + (found.down @ found.up.double()).T
    assert torch.allclose(whole, outlying(96, 64).double(), atol=1e-6)
    assert not torch.allclose(found.rest, outlying(96, 64), atol=1e-3)


def test_what_brings_nothing_or_too_much_is_refused() -> None:
    wide = {"weights": {"bits": 4, "group_size": 32, "low_rank": 17}}
    done = prepare(model(), (torch.randn(2, 64),), recipe=wide)
    reasons = [
        entry.reason for report in done.passes if report.name == "split_low_rank" for entry in report.refused
    ]
    assert reasons == [
        "rank 17 is over a quarter of its [96, 64] weight",
        "rank 17 is over a quarter of its [64, 96] weight",
    ]
    exact = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        exact.weight.copy_(torch.randint(-7, 8, (64, 64)))
        exact.weight[:, 0] = 7  # one scale of 1 a row: rounding changes nothing
    done = prepare(
        exact, (torch.randn(2, 64),), recipe={"weights": {"bits": 4, "group_size": 0, "low_rank": 2}}
    )
    reasons = [
        entry.reason for report in done.passes if report.name == "split_low_rank" for entry in report.refused
    ]
    assert len(reasons) == 1
    assert reasons[0].startswith("rank 2 brings nothing: relative error 0.00e+00 without")
    with pytest.raises(RecipeError, match="low_rank"):
        isofold.compile(exact, (torch.randn(2, 64),), recipe={"weights": {"bits": 4, "low_rank": -1}})
    with torch.no_grad():
        exact.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        prepare(exact, (torch.randn(2, 64),), recipe={"weights": {"bits": 4, "low_rank": 2}})


@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_a_compiled_model_is_nearer_to_float_with_it(activations: str) -> None:
    x = torch.randn(5, 64)
    wanted = model()(x).detach()
    errors = []
    for rank in (0, 4):
        recipe = {
            "weights": {"bits": 4, "group_size": 32, "low_rank": rank},
            "activations": {"mode": activations},
        }
        compiled = isofold.compile(model(), (x,), recipe=recipe, measure=False)
        errors.append(float((torch.as_tensor(compiled(x)) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.95 * errors[0]
    # The last linear has no activation after it: the thin part's result becomes its residual, no node of its own.
    operators = [entry["op"] for entry in compiled.profile(runs=1)]
    assert operators.count("Add") <= 1
    assert operators.count("MatMul") + operators.count("Gemm") + operators.count("FusedMatMul") == 2
    assert operators.count("PackedLinearFloat") == (2 if activations == "dynamic" else 4)
