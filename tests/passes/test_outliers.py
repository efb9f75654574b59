"""Outliers beside integer codes: which are kept, errors, fusion with what is around, refusals, the way to ONNX
Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import isofold
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError, RecipeError
from isofold.compiler.frontend import prepare
from isofold.compiler.program import Program
from isofold.compiler.recipe import Recipe, WeightFormat
from isofold.passes.fuse_attention import fuse_attention
from isofold.passes.fuse_epilogues import fuse_epilogues
from isofold.passes.fuse_gated import fuse_gated
from isofold.passes.fuse_linears import fuse_linears
from isofold.passes.outliers import quantize_with_outliers
from isofold.passes.ranges import quantize_matrix
from isofold.passes.rounded_weight import rounded_weight

FORMATS = [
    (8, 0, True),
    (4, 0, True),
    (4, 32, True),
    (4, 32, False),
    (3, 32, False),
    (2, 32, True),
    (2, 64, False),
]


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight with one percent of entries that are ten times as large."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    large = torch.rand(rows, columns, generator=g) < 0.01
    return torch.where(large, weight * 10, weight) / columns**0.5


def form(bits: int, group: int, symmetric: bool, **more: Any) -> WeightFormat:
    return WeightFormat(bits=bits, group_size=group, symmetric=symmetric, **more)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
@pytest.mark.parametrize("columns", [256, 200])
def test_they_lower_the_error_that_is_reported(bits: int, group: int, symmetric: bool, columns: int) -> None:
    weight = heavy(48, columns)
    plain = quantize_matrix(
        weight, bits=bits, group_size=group, symmetric=symmetric, search="mse", storable=True
    )
    chosen = form(bits, group, symmetric, outliers=0.02)
    found, outliers = quantize_with_outliers(weight, chosen, group)
    assert found.error < 0.75 * plain.error
    whole = rounded_weight(weight, chosen)
    assert found.error == pytest.approx(float((whole - weight).norm() / weight.norm()), rel=1e-4)
    assert outliers.places.shape == (48, round(0.02 * columns))
    # An outlier is as exact as float16 is.
    places = outliers.places.long()
    kept, wanted = whole.gather(1, places), weight.gather(1, places)
    assert torch.allclose(kept, wanted, rtol=0, atol=float(weight.abs().max()) * 2**-10)


def test_a_share_keeps_the_farthest_from_the_mean_of_each_row() -> None:
    weight = heavy(20, 100) + 3.0
    _, outliers = quantize_with_outliers(weight, form(4, 0, True, outliers=0.03), 0)
    distance = (weight - weight.mean(1, keepdim=True)).abs()
    for row in range(20):
        assert set(outliers.places[row].tolist()) == set(distance[row].topk(3).indices.tolist())


def test_sigma_keeps_what_is_so_far_out_and_nothing_else() -> None:
    weight = heavy(64, 512)
    weight[7] = 0.5  # a row without spread has no outliers
    _, outliers = quantize_with_outliers(weight, form(4, 32, True, outlier_sigma=3.0), 32)
    deviation = (weight - weight.mean(1, keepdim=True)).abs() / weight.std(1, correction=0, keepdim=True)
    wanted = (deviation >= 3).sum(1)
    assert 0 < int(wanted.sum()) < 0.03 * weight.numel()
    stored = outliers.values != 0
    assert torch.equal(stored.sum(1)[wanted <= 25], wanted[wanted <= 25])
    assert int(wanted[7]) == int(stored[7].sum()) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_outliers_do_not_widen_the_range_of_the_rest(symmetric: bool) -> None:
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight[:, 5] = 100.0
    found, _ = quantize_with_outliers(weight, form(4, 32, symmetric, outliers=0.02, range="absmax"), 32)
    assert float(found.scale.abs().max()) < 0.2
    # Of a group that is nothing but outliers nothing is left to scale.
    everything = torch.full((16, 32), 5.0)
    everything[:, 1:] = 0
    found, outliers = quantize_with_outliers(everything, form(4, 32, symmetric, outliers=0.04), 32)
    assert found.error == 0
    assert outliers.dense(32)[:, 0].tolist() == [5.0] * 16


class _Block(nn.Module):
    """An attention; two linears, gated, then one with bias, factor, activation and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(96, 40, bias=False), nn.Linear(96, 40, bias=False)
        self.query, self.key, self.value = nn.Linear(96, 64), nn.Linear(96, 64, bias=False), nn.Linear(96, 64)
        self.down = nn.Linear(40, 96)
        with torch.no_grad():
            for i, layer in enumerate((self.gate, self.up, self.query, self.key, self.value, self.down)):
                layer.weight.copy_(heavy(*layer.weight.shape, seed=i) * 2**i)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        heads = (layer(x).view(1, -1, 2, 32).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return x + nn.functional.gelu(0.5 * y), attended.transpose(1, 2)


@pytest.mark.parametrize("mode", ["dynamic", "float"])
@pytest.mark.parametrize("bits", [8, 4])
def test_linears_with_outliers_join_and_take_epilogues_like_others(
    packed: Callable[..., Program], counts: Callable[[Program], Counter[str]], mode: str, bits: int
) -> None:
    recipe = Recipe.model_validate(
        {"weights": {"bits": bits, "group_size": 32, "outliers": 0.03}, "activations": {"mode": mode}}
    )
    args = [torch.randn(5, 96, generator=torch.Generator().manual_seed(3))]
    program = packed(_Block(), args, recipe=recipe)
    name = "linear_outliers" if mode == "dynamic" else "linear_outliers_float"
    assert counts(program)[name] == 6
    fusions = (fuse_attention, fuse_gated, fuse_epilogues, fuse_linears)
    fused, reports = run_steps(program, [Step(fuse) for fuse in fusions])
    assert counts(fused)[name] == 3, [str(e) for r in reports for e in r.refused]
    assert not counts(fused)["gelu"] + counts(fused)["mul"] + counts(fused)["silu"]
    for got, wanted in zip(fused(*args), program(*args), strict=True):
        assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_a_factor_that_is_no_power_of_two_stays_outside(packed: Callable[..., Program]) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:  # the weight has two readers, so it keeps its scale
            return 0.3 * super().forward(x), super().forward(x + 1)

    recipe = Recipe.model_validate({"weights": {"bits": 4, "outliers": 0.03}})
    program = packed(Scaled(96, 64), [torch.randn(2, 96)], recipe=recipe)
    _, reports = run_steps(program, [Step(fuse_epilogues)])
    assert [entry.reason for entry in reports[0].refused] == [
        "outliers are float16 and take only a power of two"
    ]


@pytest.mark.parametrize("activations", ["float", "dynamic"])
@pytest.mark.parametrize("low_rank", [0, 4])
def test_a_compiled_model_is_nearer_to_float_with_them(activations: str, low_rank: int) -> None:
    model, x = _Block().eval(), torch.randn(70, 96, generator=torch.Generator().manual_seed(5))
    wanted = [t.detach() for t in model(x)]
    errors = []
    for share in (0.0, 0.02):
        recipe = {
            "weights": {"bits": 4, "group_size": 32, "outliers": share, "low_rank": low_rank},
            "activations": {"mode": activations},
            "prune": {"density": 0.9},
        }
        compiled = isofold.compile(model, (x,), recipe=recipe, measure=False)
        got = [torch.as_tensor(t) for t in compiled(x)]
        errors.append(sum(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)))
        kinds = Counter(entry["op"] for entry in compiled.profile(runs=1))
        assert bool(share) == bool(kinds["OutlierLinear"] + kinds["OutlierLinearFloat"])
    assert errors[1] < (0.9 if low_rank else 0.8) * errors[0]


def refusals(model: nn.Module, args: Sequence[Any], recipe: dict[str, Any]) -> list[str]:
    done = prepare(model, tuple(args), recipe=recipe)
    return [
        entry.reason
        for report in done.passes
        if report.name == "quantize_weights"
        for entry in report.refused
    ]


def test_what_they_cannot_be_kept_for_is_said() -> None:
    wide = nn.Linear(65537, 8, bias=False)
    reasons = refusals(
        nn.Sequential(wide), [torch.randn(1, 65537)], {"weights": {"bits": 4, "outliers": 0.01}, "layers": []}
    )
    assert reasons == ["its weight has 65537 inputs, and places of outliers name at most 65536"]
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        prepare(layer, (torch.randn(1, 64),), recipe={"weights": {"bits": 4, "outliers": 0.01}})
    for weights, message in (
        ({"bits": 4, "outliers": 0.2}, "less than or equal to 0.05"),
        ({"bits": 4, "outliers": 0.01, "outlier_sigma": 3}, "two rules; give one"),
        ({"bits": 4, "outlier_sigma": 1}, "greater than or equal to 2"),
        ({"format": "nf4", "outliers": 0.01}, "format nf4 has no outliers"),
        ({"format": "codebook", "outlier_sigma": 3}, "format codebook has no outlier_sigma"),
    ):
        with pytest.raises(RecipeError, match=message):
            isofold.compile(nn.Linear(64, 64), (torch.randn(1, 64),), recipe={"weights": weights})


def test_a_rotation_folds_before_outliers_are_chosen() -> None:
    program = capture(_Block().eval(), (torch.randn(3, 96),))
    recipe = {"weights": {"bits": 4, "group_size": 32, "outliers": 0.01}, "fold": {"rotation": "hadamard"}}
    done = prepare(program, recipe=recipe)
    applied = [e for r in done.passes if r.name == "quantize_weights" for e in r.applied]
    assert len(applied) == 6
    assert all("outliers in float16" in entry.what for entry in applied)
