"""Calibration: exact histograms in any order, ranges, and errors that name the batch and the input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from isofold.compiler.capture import capture
from isofold.compiler.errors import InputError
from isofold.compiler.program import Program
from isofold.passes.calibrate import Histogram, calibrate, static_params


@pytest.fixture(scope="module")
def program() -> Program:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.linear = nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.relu(self.table(ids) + x))

    torch.manual_seed(0)
    batch = Dim("batch", min=1, max=64)
    return capture(
        Model(),
        (torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 3, 8)),
        dynamic_shapes=({0: batch}, {0: batch}),
    )


def batches(count: int = 3) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 10, (n + 1, 3), generator=g), torch.randn(n + 1, 3, 8, generator=g))
        for n in range(count)
    ]


def relu(program: Program) -> str:
    return next(n.name for n in program.graph.nodes if n.target == torch.ops.aten.relu.default)


def test_histograms_count_everything_in_any_order_of_sizes() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 4, generator=g) * size for size in (1e-3, 1.0, 300.0)]
    forward, backward = Histogram(), Histogram()
    for part in parts:
        forward.add(part)
    for part in reversed(parts):
        backward.add(part)
    assert forward.width == backward.width
    assert torch.equal(forward.counts, backward.counts)
    assert torch.allclose(forward.relative, backward.relative)
    assert int(forward.counts.sum()) == 600
    everything = torch.cat(parts)
    assert (forward.low, forward.high) == (float(everything.min()), float(everything.max()))
    low, high = forward.range(percentile=90.0)
    outside = ((everything < low) | (everything > high)).double().mean()
    assert 0.05 < outside <= 0.1


def test_zeros_one_sided_and_power_of_two_values() -> None:
    zeros = Histogram()
    zeros.add(torch.zeros(3, 4))
    assert zeros.range() == (0.0, 0.0)
    assert zeros.range(search="mse") == (0.0, 0.0)
    assert static_params(*zeros.range()).tolist() == [1.0, 0.0]
    positive = Histogram()
    positive.add(torch.tensor([[0.5, 4.0]]))
    positive.add(torch.zeros(1, 2))
    assert positive.range() == (0.0, 4.0)
    assert int(positive.counts.sum()) == 4


def test_mse_clips_a_rare_outlier_and_minmax_does_not() -> None:
    values = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 60.0
    histogram = Histogram()
    histogram.add(values)
    assert histogram.range()[1] == 60.0
    low, high = histogram.range(search="mse")
    assert high < 35

    def error(low: float, high: float) -> float:
        scale, zero = static_params(low, high)
        rounded = scale * ((torch.round(values / scale) + zero).clamp(0, 255) - zero)
        return float((rounded - values).square().sum(1).div(values.square().sum(1)).sum())

    assert error(low, high) < 0.7 * error(*histogram.range())


def test_static_params_hold_zero_and_the_ends() -> None:
    scale, zero = static_params(-1.0, 3.0)
    assert float(zero) == round(float(zero))
    assert float(-zero * scale) == pytest.approx(-1.0, abs=float(scale))
    assert float((255 - zero) * scale) == pytest.approx(3.0, abs=float(scale))


def test_batches_may_be_tuples_mappings_and_generators(program: Program) -> None:
    name = relu(program)
    given = batches()
    forms = (given, [{"ids": i, "x": x} for i, x in given], (b for b in given), [list(b) for b in given])
    found = [calibrate(program, {name: "token"}, form)[name] for form in forms]
    assert all(torch.equal(h.counts, found[0].counts) for h in found)
    assert found[0].low == 0.0
    assert int(found[0].counts.sum()) == (1 + 2 + 3) * 24


def test_progress_counts_batches(program: Program) -> None:
    seen: list[tuple[int, int | None]] = []
    calibrate(program, {}, batches(2), lambda done, total: seen.append((done, total)))
    calibrate(program, {}, iter(batches(1)), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2), (1, None)]


def damaged(index: int, **changes: Any) -> list[Any]:
    given = [list(b) for b in batches()]
    for position, changed in changes.items():
        given[index][int(position[1:])] = changed
    return [tuple(b) for b in given]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            damaged(1, _1=torch.full((2, 3, 8), torch.nan)),
            r"holds NaN or infinity\n  where: batch 1, input 'x'\n  got: 48 of 48",
        ),
        (
            damaged(2, _1=torch.zeros(3, 3, 7)),
            r"does not fit the model\n  where: batch 2\n  got: .*x: expected shape",
        ),
        (
            damaged(0, _0=torch.zeros(1, 3)),
            r"where: batch 0\n  got: .*ids: expected torch.int64, got torch.float32",
        ),
        (
            damaged(0, _0=torch.full((1, 3), 10)),
            r"cannot run on the calibration data\n  where: batch 0\n  got: IndexError",
        ),
        (damaged(0, _1=torch.full((1, 3, 8), 3e38) * 1.2), r"holds NaN or infinity"),
        ([(torch.zeros(1, 3, dtype=torch.int64),)], r"does not fit the model\n  where: batch 0"),
        ([], r"no calibration batches"),
        (torch.zeros(2, 3), r"must be several batches[\s\S]*got: Tensor[\s\S]*wrap a single batch in a list"),
        (5, r"must be several batches[\s\S]*got: int"),
    ],
)
def test_bad_data_is_an_error_that_names_batch_and_input(program: Program, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(program, {relu(program): "token"}, data)
