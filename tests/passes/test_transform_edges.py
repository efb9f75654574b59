"""transform_edges: the same function with any scale, shift and Hadamard transform; the graph it makes; refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import REAL_TOLERANCE, Step, relative_error, run_steps
from isofold.compiler.errors import InputError
from isofold.compiler.hadamard_orders import factor
from isofold.compiler.program import Program
from isofold.compiler.recipe import ActivationFormat, ConvolutionFormat, LayerRule, Recipe, WeightFormat
from isofold.passes import transform_edges as module
from isofold.passes.sites import EdgeTransform, find_sites
from isofold.passes.transform_edges import transform_edges

DYNAMIC = ActivationFormat(mode="dynamic")
W8A8 = Recipe(weights=WeightFormat(bits=8), activations=DYNAMIC, convolutions=ConvolutionFormat())


class PostNorm(nn.Module):
    """q, k and v on one norm's output, which the residual sum reads too; an output layer without bias."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=name != "k") for name in "qkv")
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        h = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        return x + self.o(torch.nn.functional.gelu(h))


class Convolutions(nn.Module):
    """One convolution that pads, one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.Conv2d(8, 16, 3, padding=1)
        self.bare = nn.Conv2d(16, 32, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(torch.tanh(self.padded(x)))


def program_of(model: nn.Module, *args: Tensor, dynamic_shapes: Any = None) -> Program:
    return canonicalize(capture(model.eval(), args, None, dynamic_shapes)).program


def random_transforms(program: Program, recipe: Recipe, **only: bool) -> dict[str, EdgeTransform]:
    g = torch.Generator().manual_seed(7)
    made = {}
    for site in find_sites(program, recipe):
        scale = torch.exp(torch.randn(site.channels, generator=g, dtype=torch.float64) * 2)
        shift = torch.randn(site.channels, generator=g, dtype=torch.float64)
        orders = factor(site.channels) if only.get("hadamard") else ()
        made[site.name] = EdgeTransform(
            scale if only.get("scale", True) else None, shift if only.get("shift", True) else None, orders
        )
    return made


def error_of(program: Program, changed: Program, *args: Tensor) -> float:
    return relative_error(program.run_float64(args or None), changed.run_float64(args or None))


@pytest.mark.parametrize("hadamard", [False, True])
def test_any_scale_and_shift_leave_the_function_as_it_is(hadamard: bool) -> None:
    program = program_of(PostNorm(), torch.randn(2, 5, 48))
    transforms = random_transforms(program, W8A8, hadamard=hadamard)
    _, reports = run_steps(
        program, [Step(transform_edges, {"recipe": W8A8, "transforms": transforms})], verify=True
    )
    assert reports[0].error is not None
    # Scales that differ by four orders are mixed by the Hadamard transform, and so is their rounding.
    assert 0 < reports[0].error < (1e-6 if not hadamard else REAL_TOLERANCE)
    assert [len(a.facts["readers"]) for a in reports[0].applied] == [3, 1]
    assert not reports[0].refused


def test_the_graph_shares_one_transform_and_leaves_other_readers_alone(text: Callable[..., Any]) -> None:
    program = program_of(PostNorm(), torch.randn(2, 5, 48))
    result = transform_edges(program, recipe=W8A8, transforms=random_transforms(program, W8A8, hadamard=True))
    lines = text(result.program)
    assert lines[0] == "%0 = layer_norm(x0, [48], c, c, 1e-05, False)"
    assert lines[1:7] == [
        "%1 = sub(%0, c)",
        "%2 = mul(%1, c)",
        "%3 = hadamard(%2, [12, 4], False)",
        "%4 = linear(%3, c, c)",
        "%5 = linear(%3, c, c)",
        "%6 = linear(%3, c, c)",
    ]
    # The residual sum still reads the norm itself.
    assert "add(%0," in lines[-1]
    assert sum("hadamard" in line for line in lines) == 2


def test_sizes_that_vary_stay_varying() -> None:
    free = {0: Dim("batch", min=1, max=16), 1: Dim("length", min=2, max=64)}
    program = program_of(PostNorm(), torch.randn(2, 5, 48), dynamic_shapes=(free,))
    changed = transform_edges(program, recipe=W8A8, transforms=random_transforms(program, W8A8)).program
    for sizes in ((1, 2), (7, 33)):
        assert error_of(program, changed, torch.randn(*sizes, 48)) < 1e-6
    assert changed.dynamic_shapes is not None


def test_convolutions_take_scales_always_and_shifts_where_nothing_is_padded() -> None:
    program = program_of(Convolutions(), torch.randn(2, 8, 11, 9))
    result = transform_edges(program, recipe=W8A8, transforms=random_transforms(program, W8A8, hadamard=True))
    assert error_of(program, result.program) < 1e-6
    reasons = [r.reason for r in result.report.refused]
    assert any("padded pads with zeros" in reason for reason in reasons)
    assert sum("no Hadamard transform" in reason for reason in reasons) == 2
    whats = [a.what for a in result.report.applied]
    assert whats == ["scale on the edge to 1 layers", "shift, scale on the edge to 1 layers"]


def test_without_the_padding_rule_the_function_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side condition is needed: a shifted convolution with padding is wrong at the edges."""
    monkeypatch.setattr(module.Site, "shift_refusal", None)
    program = program_of(Convolutions(), torch.randn(2, 8, 11, 9))
    result = transform_edges(program, recipe=W8A8, transforms=random_transforms(program, W8A8))
    assert error_of(program, result.program) > 1e-2


def test_the_inverse_must_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(PostNorm(), torch.randn(2, 5, 48))
    transforms = random_transforms(program, W8A8)
    for part in ("fold", "offset"):
        with monkeypatch.context() as patch:
            identity = {"fold": lambda self, weight: weight.double(), "offset": lambda self, weight: None}
            patch.setattr(EdgeTransform, part, identity[part])
            changed = transform_edges(program, recipe=W8A8, transforms=transforms).program
            assert error_of(program, changed) > 1e-2


class ComputedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 32))
        self.table = nn.Parameter(torch.randn(2, 40))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.table[index].sum(0))


def test_a_computed_bias_takes_no_shift_but_the_scale_stays() -> None:
    program = program_of(ComputedBias(), torch.randn(3, 32), torch.tensor([0, 1]))
    result = transform_edges(program, recipe=W8A8, transforms=random_transforms(program, W8A8))
    assert error_of(program, result.program) < 1e-6
    assert [r.reason for r in result.report.refused] == [
        "no shift: the bias of linear is computed in the graph, not a constant"
    ]
    assert [a.what for a in result.report.applied] == ["scale on the edge to 1 layers"]


class Tied(nn.Module):
    """One weight read behind two values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


def test_a_weight_of_two_sites_is_copied_only_where_one_keeps_the_old() -> None:
    program = program_of(Tied(), torch.randn(3, 32))
    transforms = random_transforms(program, W8A8)
    assert len(transforms) == 2
    both = transform_edges(program, recipe=W8A8, transforms=transforms)
    assert error_of(program, both.program) < 1e-6
    name = next(iter(transforms))
    one = transform_edges(program, recipe=W8A8, transforms={name: transforms[name]})
    assert error_of(program, one.program) < 1e-6
    assert one.report.applied[0].facts["bytes_added"] == 4 * 32 * 32


def test_identities_and_sites_without_an_entry_change_nothing() -> None:
    program = program_of(PostNorm(), torch.randn(2, 5, 48))
    sites = find_sites(program, W8A8)
    nothing = EdgeTransform(torch.ones(48), torch.zeros(48))
    result = transform_edges(program, recipe=W8A8, transforms={sites[0].name: nothing})
    assert not result.report.applied
    assert result.program.operator_count == program.operator_count


def test_errors_name_every_transform_that_does_not_fit() -> None:
    program = program_of(PostNorm(), torch.randn(2, 5, 48))
    name = find_sites(program, W8A8)[0].name
    with pytest.raises(InputError) as caught:
        transform_edges(
            program,
            recipe=W8A8,
            transforms={name: EdgeTransform(torch.ones(47)), "elsewhere": EdgeTransform(torch.ones(48))},
        )
    assert "'elsewhere' is no site" in str(caught.value)
    assert f"{name!r}: scale of 47 for 48 channels" in str(caught.value)


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")])]
)
def test_scales_must_be_positive_and_finite(bad: Tensor) -> None:
    with pytest.raises(InputError, match="scale on an edge"):
        EdgeTransform(bad)


def test_sites_follow_the_recipe() -> None:
    program = program_of(PostNorm(), torch.randn(2, 5, 48))
    assert [[r.path for r in s.readers] for s in find_sites(program, W8A8)] == [["q", "k", "v"], ["o"]]
    split = W8A8.model_copy(
        update={
            "layers": [
                LayerRule(match="k", activations=ActivationFormat(bits=4)),
                LayerRule(match="o", weights=None),
            ]
        }
    )
    found = find_sites(program, split)
    assert [[r.path for r in s.readers] for s in found] == [["q", "v"], ["k"]]
    assert [s.bits for s in found] == [8, 4]
    assert len({s.value for s in found}) == 1
    assert find_sites(program, Recipe()) == []
