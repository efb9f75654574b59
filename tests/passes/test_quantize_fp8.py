"""FP8 weights and activations through the pipeline: codes, sharing, static scales, fusions, folds, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.capture import capture
from isofold.compiler.driver import run_steps
from isofold.compiler.graph import argument
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, ActivationFormat, Fold, Recipe, WeightFormat
from isofold.passes.calibrate import Histogram, static_scale
from isofold.passes.choose_by_curvature import FP8_NOISE
from isofold.passes.pipeline import plan

from .test_quantize_coded import IDS, Block, Mlp, count, normal

OPS: Any = torch.ops.isofold
aten = torch.ops.aten


def recipe(mode: Any = "dynamic", weights: str = "e4m3", group: Any = 0, **more: Any) -> Recipe:
    chosen = WeightFormat(format=weights, group_size=group)
    return Recipe(weights=chosen, activations=ActivationFormat(mode=mode, format="e4m3"), **more)


def run(
    model: nn.Module, args: tuple[Any, ...], chosen: Recipe, **more: Any
) -> tuple[Program, dict[str, PassReport]]:
    captured = capture(model.eval(), args)
    program, reports = run_steps(captured, plan(captured, chosen, **more))
    return program, {r.name: r for r in reports}


def error(program: Program, model: nn.Module, *args: Tensor) -> float:
    with torch.no_grad():
        want = model(*args)
        return float((program(*args) - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("weights", "group"), [("e4m3", 0), ("e4m3", 32), ("e5m2", 128), ("mxfp8_e4m3", 32), ("mxfp8_e5m2", 32)]
)
def test_linears_and_their_inputs_become_codes(weights: str, group: int) -> None:
    model, x = Mlp(), normal(3, 48)
    program, reports = run(model, (x,), recipe("dynamic", weights, group))
    assert count(program, OPS.linear_fp8.default) == count(program, OPS.quantize_activation_fp8.default) == 3
    assert (
        count(program, OPS.quantize_dequantize_fp8.default) == count(program, OPS.linear_coded.default) == 0
    )
    assert reports["pack_coded_linears"].error is not None
    assert reports["pack_coded_linears"].error <= 1e-12
    assert {a.facts["activations"] for a in reports["pack_coded_linears"].applied} == {"e4m3"}
    assert "input to e4m3, per token" in reports["quantize_activations"].applied[0].what
    assert error(program, model, x) < (0.1 if "e5m2" in weights else 0.06)


def test_readers_of_one_value_share_its_codes_and_join() -> None:
    model = Block()
    program, _ = run(model, (IDS,), PRESETS["fp8"])
    # Queries, keys and values; output; gate and up; down; head.
    assert count(program, OPS.linear_fp8.default) == count(program, OPS.quantize_activation_fp8.default) == 5
    gated = [n for n in program.graph.nodes if n.target == OPS.linear_fp8.default and argument(n, "gated")]
    sums = [n for n in program.graph.nodes if n.target == OPS.linear_fp8.default and argument(n, "residual")]
    assert len(gated) == 1
    assert len(sums) == 2
    assert count(program, OPS.norm.default) == 2
    assert error(program, model, IDS) < 0.08


def test_norms_say_why_they_take_no_fp8_quantizer() -> None:
    _, reports = run(Block(), (IDS,), PRESETS["fp8"])
    reasons = [r.reason for r in reports["fuse_norms"].refused]
    assert reasons.count("its codes are FP8, and norms that quantize make integers") == 2


def test_static_scales_come_from_the_data() -> None:
    model, data = Mlp(), [(normal(3, 48, seed=s),) for s in range(3)]
    chosen = recipe("static").model_copy(
        update={"activations": ActivationFormat(mode="static", format="e4m3", range="minmax")}
    )
    program, reports = run(model, data[0], chosen, calibration=data)
    largest = max(float(x.abs().max()) for (x,) in data)
    first = next(n for n in program.graph.nodes if n.target == OPS.quantize_activation_fp8.default)
    held = program.tensors[str(argument(first, "params").target)]
    assert held.tolist() == static_scale(largest).tolist() == [pytest.approx(largest / 448)]
    assert "input to e4m3, static in [-" in reports["quantize_activations"].applied[0].what
    assert error(program, model, *data[0]) < 0.06


def test_a_search_of_scales_has_the_least_error() -> None:
    histogram, values = Histogram(), normal(64, 512)
    values[:, 8:] = 17 / 448  # in the middle of two codes, where the largest value is 1
    values[:, :8] = values[:, :8].clamp(-1, 1)
    values[0, 0] = 1.0
    histogram.add(values)
    assert histogram.largest() == float(values.abs().max())

    def lost(largest: float) -> float:
        moved = OPS.quantize_dequantize_fp8(values, static_scale(largest)) - values
        return float((moved.square().sum(1) / values.square().sum(1)).sum())

    found = histogram.largest(100.0, "mse")
    others = [histogram.largest() * share for share in (1.0, 0.9, 0.7, 0.5)]
    assert lost(found) < 0.9 * lost(others[0])
    assert lost(found) <= min(map(lost, others)) * 1.001
    assert histogram.largest(99.0) < histogram.largest()
    assert static_scale(0.0).tolist() == [1.0]


def test_the_noise_of_e4m3_is_that_of_normal_values() -> None:
    for channels in (64, 512, 4096):
        x = normal(1 << 18).reshape(-1, channels).double()
        found = float((OPS.quantize_dequantize_fp8(x, None) - x).square().sum() / x.square().sum())
        assert found == pytest.approx(FP8_NOISE, rel=0.15)


def test_convolutions_beside_fp8_linears_are_integers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.linear = nn.Conv1d(16, 32, 3), nn.Linear(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).transpose(1, 2))

    model, x = Mixed(), normal(2, 16, 20)
    program, reports = run(model, (x,), PRESETS["fp8"])
    assert count(program, OPS.conv_packed.default) == count(program, OPS.linear_fp8.default) == 1
    assert sorted(a.facts["format"] for a in reports["quantize_activations"].applied) == ["e4m3", "int"]
    assert error(program, model, x) < 0.08


def test_weights_alone_may_be_fp8_beside_both() -> None:
    rules = [{"match": "b", "activations": {"mode": "float"}}]
    program, _ = run(Mlp(), (normal(3, 48),), recipe(layers=rules))
    assert count(program, OPS.linear_fp8.default) == 2
    assert count(program, OPS.linear_coded.default) == 1


class Uneven(nn.Module):
    """A linear behind a norm, on channels of very different sizes: what static scales of a tensor cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 96)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-3, 3, 64)[torch.randperm(64)])
            self.linear.weight.mul_(1 / self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("scale", ["smoothquant", "search"])
def test_folded_scales_help_as_with_integers(mode: str, scale: Any) -> None:
    model, data = Uneven(), [(normal(8, 64, seed=s),) for s in range(3)]
    plain, _ = run(model, data[0], recipe(mode), calibration=data)
    folded, _ = run(model, data[0], recipe(mode, fold=Fold(scale=scale, shift="mean")), calibration=data)
    assert error(folded, model, *data[0]) < 0.7 * error(plain, model, *data[0])


def test_online_transforms_and_edges_are_taken_into_the_quantizer() -> None:
    model = Block()
    chosen = PRESETS["fp8"].model_copy(update={"fold": Fold(rotation="hadamard", scale="cle")})
    program, _ = run(model, (IDS,), chosen, calibration=[(IDS,)])
    quantizers = [n for n in program.graph.nodes if n.target == OPS.quantize_activation_fp8.default]
    assert any(argument(n, "hadamard") for n in quantizers)
    assert count(program, OPS.hadamard.default) == 0
    assert error(program, model, IDS) < 0.08


def test_learned_transforms_train_through_the_rounding() -> None:
    model = Block()
    fold = Fold(rotation="learned", scale="learned", shift="learned", steps=2)
    program, _ = run(model, (IDS,), PRESETS["fp8"].model_copy(update={"fold": fold}), calibration=[(IDS,)])
    assert count(program, OPS.linear_fp8.default) == 5
    assert error(program, model, IDS) < 0.1
