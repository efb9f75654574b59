"""Simulated rounding becomes `quantize_dequantize`; what is not the kernels' own stays, or is measured."""

from __future__ import annotations

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
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import ActivationFormat, ConvolutionFormat, LayerRule, Recipe, WeightFormat
from isofold.passes.extract_rounding import extract_rounding

RECIPE = Recipe(
    weights=WeightFormat(bits=8),
    convolutions=ConvolutionFormat(),
    activations=ActivationFormat(mode="dynamic"),
)
K, N = 32, 24
S, Z = 0.03, 113
Function = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """A linear (or convolution) that reads what `rounding` makes of the input."""

    def __init__(self, rounding: Function, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Linear(K, N)
        self.rounding = rounding
        self.register_buffer("scale", torch.tensor(S))
        self.register_buffer("zero", torch.tensor([Z], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.rounding(x))


def extracted(
    model: nn.Module, x: Tensor, dynamic: bool = False, recipe: Recipe = RECIPE
) -> tuple[Program, Program, PassReport]:
    """The canonical program, what the pass makes of it, and its report."""
    shapes = ({0: Dim("rows")},) if dynamic else None
    captured = capture(model.eval(), (x,), dynamic_shapes=shapes)
    before, _ = run_steps(captured, [Step(canonicalize)])
    after, (report,) = run_steps(before.lent(), [Step(extract_rounding, {"recipe": recipe})])
    return before, after, report


def inputs(*sizes: int) -> Tensor:
    """Values of which some are beyond the static range, and rows of different ranges, some of one sign, one zero."""
    x = torch.randn(sizes) * torch.linspace(0.1, 3.0, sizes[0]).reshape(-1, *[1] * (len(sizes) - 1))
    x[0] = 0.0
    x[1].abs_()
    x[2].abs_().neg_()
    return x


def tensor(number: float) -> Tensor:
    return torch.tensor(float(number))


STATIC: dict[str, Function] = {
    "divided": lambda x: (torch.clamp(torch.round(x / S) + Z, 0, 255) - Z) * S,
    "reciprocal": lambda x: (torch.clamp(Z + torch.round((1 / S) * x), 0, 255) - Z) * S,
    "signed": lambda x: (torch.clamp(torch.round(x / S) + Z - 128, -128, 127) - (Z - 128)) * S,
    "zero point inside": lambda x: (torch.clamp(torch.round(x / S + Z), 0, 255) - Z) * S,
    "clamped first": lambda x: torch.clamp(torch.round(x / S), -Z, 255 - Z) * S,
    "divided again": lambda x: (torch.clamp(torch.round(x / S) + Z, 0, 255) - Z) / (1 / S),
    "in two": lambda x: (torch.round(x / S) + Z).clamp(min=0).clamp(max=255).sub(Z).mul(S),
    "extremes": lambda x: (
        (torch.minimum(torch.maximum(torch.round(x / S) + Z, tensor(0)), tensor(255)) - Z) * S
    ),
    "clamped twice": lambda x: torch.clamp(torch.round(x / S), -Z, 255 - Z).clamp(-999, 999) * S,
    "integers": lambda x: (((torch.round(x / S) + Z).clamp(0, 255).to(torch.uint8)).float() - Z) * S,
    "factors in front": lambda x: (torch.clamp(torch.round(x * 0.5 / (S / 2)) + Z, 0, 255) - Z) * S,
    "operator": lambda x: torch.fake_quantize_per_tensor_affine(x, S, Z, 0, 255),
    "operator on tensors": lambda x: torch.fake_quantize_per_tensor_affine(
        x, tensor(S), torch.tensor(Z, dtype=torch.int32), 0, 255
    ),
}


@pytest.mark.parametrize("spelling", STATIC)
def test_static_spellings(spelling: str, text: Any) -> None:
    model, x = Model(STATIC[spelling]), inputs(6, K)
    _, after, report = extracted(model, x, dynamic=True)
    assert [entry.facts["exact"] for entry in report.applied] == [True]
    assert [line.split("(")[0] for line in text(after)] == ["%0 = quantize_dequantize", "%1 = linear"]
    (params,) = (t for name, t in after.parameters.items() if "params" in name)
    torch.testing.assert_close(params, torch.tensor([S, float(Z)]))
    assert (report.error or 0) < 1e-6
    for rows in (6, 4):
        torch.testing.assert_close(after(x[:rows]), model(x[:rows]), rtol=1e-5, atol=1e-5)


def test_static_on_buffers_and_the_text(text: Any) -> None:
    model = Model(
        lambda x: (torch.clamp(torch.round(x / model.scale) + model.zero, 0, 255) - model.zero) * model.scale
    )
    _, after, report = extracted(model, inputs(6, K))
    assert text(after) == ["%0 = quantize_dequantize(x0, c, 'token', 8)", "%1 = linear(%0, c, c)"]
    (entry,) = report.applied
    assert entry.what == "input to static uint8, scale 0.03, zero point 113, for 1 layers"
    assert entry.facts == {"mode": "static", "bits": 8, "exact": True, "readers": ["layer"]}


def test_views_between_the_rounding_and_its_reader_stand_in_front(text: Any) -> None:
    model = Model(lambda x: STATIC["divided"](x).flatten(1), nn.Linear(4 * K, N))
    x = inputs(6, 4, K)
    _, after, report = extracted(model, x)
    assert report.applied[0].facts["exact"]
    assert text(after)[1:] == ["%1 = quantize_dequantize(%0, c, 'token', 8)", "%2 = linear(%1, c, c)"]
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)
    rows = Model(lambda x: _asymmetric(x).flatten(1), nn.Linear(4 * K, N))
    assert "no linear" in extracted(rows, x)[2].refused[0].reason


def test_what_is_rounded_again_on_the_same_grid_is_rounded_once(text: Any) -> None:
    def rounded(x: Tensor, low: int = 0) -> Tensor:
        return torch.round(x / S).clamp(low, 255 + low) * S

    def pooled(x: Tensor, low: int = 0) -> Tensor:
        return rounded(F.max_pool2d(rounded(x, low), 2).reshape(-1, 2, 4, 4))

    model, x = Model(pooled, nn.Conv2d(2, 3, 3)), inputs(6, 2, 8, 8)
    _, after, report = extracted(model, x, dynamic=True)
    assert report.applied[0].what == "all that read it round it again on the same grid: once is enough"
    assert [line.split(" = ")[1].split("(")[0] for line in text(after) if "sym_size" not in line] == [
        "max_pool2d",
        "quantize_dequantize",
        "conv2d",
    ]
    assert (report.error or 0) < 1e-6
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)
    elsewhere = (
        Model(lambda x: pooled(x, -128), nn.Conv2d(2, 3, 3)),  # another grid
        Model(lambda x: rounded(F.avg_pool2d(rounded(x), 2)), nn.Conv2d(2, 3, 3)),  # new values
        Model(lambda x: (y := rounded(x), rounded(y) + y)[1], nn.Conv2d(2, 3, 3)),  # another reader
    )
    for other in elsewhere:
        assert not any("once is enough" in entry.what for entry in extracted(other, x)[2].applied)


def test_four_bits_and_two_readers(text: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.round(x / 0.2).clamp(-8, 7) * 0.2
            return self.a(x) * self.b(x) + x.sum()

    model, x = Two(), inputs(6, K)
    _, after, report = extracted(model, x)
    assert text(after)[0] == "%0 = quantize_dequantize(x0, c, 'token', 4)"
    assert report.applied[0].facts["readers"] == ["a", "b"]
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


FEWER: dict[str, tuple[Function, bool, tuple[int, float]]] = {
    "clamped in front": (lambda x: torch.round(x / S).clamp(-127, 127) * S, True, (8, 127)),
    "never below": (lambda x: torch.round(F.relu(x) / S).clamp(-100, 127) * S, False, (8, 128)),
    "never above": (lambda x: torch.round(x.clamp(max=1.0) / S).clamp(-100, 40) * S, False, (8, 100)),
    "never beyond": (lambda x: torch.round(x.clamp(-1, 1) * 127).clamp(-127, 127) / 127, False, (8, 127)),
    "four bits": (lambda x: torch.round(x / 0.3).clamp(-7, 7) * 0.3, True, (4, 7)),
}


@pytest.mark.parametrize("case", FEWER)
def test_fewer_levels_are_exact_with_a_clamp_where_one_is_needed(case: str, text: Any) -> None:
    rounding, clamped, (bits, zero) = FEWER[case]
    model, x = Model(rounding), inputs(6, K) * 2
    _, after, report = extracted(model, x)
    assert f"zero point {zero:g}" in report.applied[0].what
    assert report.applied[0].facts["bits"] == bits
    assert ("clamped to" in report.applied[0].what) == clamped
    assert (report.error or 0) < 1e-6
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


def _range(x: Tensor, dims: Any = -1) -> tuple[Tensor, Tensor]:
    return x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)


def _asymmetric(x: Tensor, dims: Any = -1, eps: float = 1e-30, top: int = 255) -> Tensor:
    low, high = _range(x, dims)
    scale = ((high - low) / top).clamp(min=eps)
    zero = torch.round(-low / scale).clamp(0, top)
    return (torch.clamp(torch.round(x / scale) + zero, 0, top) - zero) * scale


def _signed_asymmetric(x: Tensor) -> Tensor:
    """Signed codes, integers, another order: as torchao and PT2E compute it."""
    low, high = torch.aminmax(x, dim=-1)
    low, high = torch.minimum(low, torch.zeros_like(low)), torch.maximum(high, torch.zeros_like(high))
    scale = torch.clamp((high - low) / 255.0, min=torch.finfo(torch.float32).tiny)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127).to(torch.int8).unsqueeze(-1)
    scale = scale.unsqueeze(-1)
    codes = torch.clamp(torch.round(x * (1.0 / scale)) + zero, -128, 127).to(torch.int8)
    return (codes.float() - zero.float()) * scale


def _by_choice(x: Tensor) -> Tensor:
    """The zero point from the end with the smaller error, which are one over the reals."""
    low, high = _range(x)
    scale = ((high - low) / 255).clamp(min=1e-20)
    a, b = low / scale, high / scale
    zero = torch.where((a - 128) + (b + 127) > 0, -128 - a, 127 - b).clamp(-128, 127).round()
    return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale


EQUAL: dict[str, Function] = {
    "unsigned": _asymmetric,
    "signed": _signed_asymmetric,
    "by choice": _by_choice,
    "four bits": lambda x: _asymmetric(x, top=15),
    "rows merged": lambda x: _asymmetric(x.reshape(-1, K)).reshape(x.shape),
    "rows split": lambda x: _asymmetric(x).reshape(x.shape[0], -1, 1, K),
}


@pytest.mark.parametrize("spelling", EQUAL)
def test_ranges_of_tokens_that_are_the_kernels_own(spelling: str, text: Any) -> None:
    model, x = Model(EQUAL[spelling]), inputs(5, 3, K)
    _, after, report = extracted(model, x, dynamic=True)
    assert [entry.facts["exact"] for entry in report.applied] == [True]
    bits = 4 if spelling == "four bits" else 8
    assert any(f"None, 'token', {bits})" in line for line in text(after))
    assert text(after)[-1] == f"%{len(text(after)) - 1} = linear(%{len(text(after)) - 2}, c, c)"
    assert "quantize_dequantize" in text(after)[-2]
    assert (report.error or 0) < 1e-6
    for rows in (5, 4):
        torch.testing.assert_close(after(x[:rows]), model(x[:rows]), rtol=1e-5, atol=1e-4)


def test_samples_of_convolutions_and_the_guard(text: Any) -> None:
    model = Model(lambda x: _asymmetric(x, (1, 2, 3), eps=1e-3), nn.Conv2d(3, 8, 3))
    x = inputs(4, 3, 6, 6)
    x[0] = torch.randn(3, 6, 6) * 1e-3
    before, after, report = extracted(model, x)
    assert text(after)[0] == "%0 = quantize_dequantize(x0, None, 'sample', 8)"
    (entry,) = report.applied
    assert (
        entry.what
        == "input to dynamic uint8 of each sample, equal for rows of a range above 0.255, for 1 layers"
    )
    torch.testing.assert_close(after(x)[1:], model(x)[1:], rtol=1e-5, atol=1e-4)
    assert relative_error([before(x)[:1]], [after(x)[:1]]) > 1e-3  # below the guard it is finer


def _symmetric(x: Tensor, divisor: float = 127.0, dims: Any = -1, low: int = -128, high: int = 127) -> Tensor:
    scale = (x.abs().amax(dims, keepdim=True) / divisor).clamp(min=1e-9)
    return torch.round(x / scale).clamp(low, high) * scale


FINER: dict[str, tuple[Function, str]] = {
    "127": (_symmetric, "1 to 2.01 times as narrow"),
    "half the levels": (lambda x: _symmetric(x, 127.5), "1 to 2 times as narrow"),
    "two sided": (
        lambda x: (lambda s: torch.round(x / s).clamp(-128, 127) * s)(
            2 * torch.maximum(-_range(x)[0], _range(x)[1]) / 255 + 1e-12
        ),
        "1 to 2 times as narrow",
    ),
    "no clamp": (
        lambda x: (lambda s: torch.round(x / s) * s)(x.abs().amax(-1, keepdim=True) / 127 + 1e-9),
        "2.01",
    ),
    "four bits": (lambda x: _symmetric(x, 7, low=-8, high=7), "dynamic uint4"),
    "tensor": (lambda x: _asymmetric(x, (0, 1)), "wider one range for each tensor"),
}


@pytest.mark.parametrize("case", FINER)
def test_coarser_steps_are_replaced_by_finer_ones_and_measured(case: str, text: Any) -> None:
    rounding, what = FINER[case]
    model, x = Model(rounding), inputs(6, K)
    before, after, report = extracted(model, x)
    (entry,) = report.applied
    assert what in entry.what
    assert entry.facts["exact"] is False
    assert text(after)[0].startswith("%0 = quantize_dequantize(x0, None, 'token'")
    assert report.error is not None
    assert report.error > 1e-5
    rounded = nn.functional.linear(x, model.layer.weight, model.layer.bias)
    assert (after(x) - rounded).norm() <= 1.05 * (before(x) - rounded).norm()


REFUSED: dict[str, tuple[Function, str]] = {
    "levels": (lambda x: torch.round(x / S).clamp(-512, 511) * S, "-512..511, more than 256"),
    "no clamp": (lambda x: torch.round(x / S) * S * 1.0 + 0 * x.clamp(0, 1), ""),
    "half": (lambda x: torch.round(x / S).clamp(-127.5, 127) * S, "have to be whole"),
    "not around zero": (lambda x: torch.round(x / S).clamp(3, 258) * S, "around 0"),
    "other scale": (lambda x: torch.round(x / S).clamp(-128, 127) * (2 * S), "is not the inverse"),
    "channels": (lambda x: torch.round(x / _CHANNELS).clamp(-128, 127) * _CHANNELS, ""),
    "rows": (lambda x: torch.round(x / _ROWS).clamp(-128, 127) * _ROWS, "a number for each channel or row"),
    "narrower": (lambda x: _symmetric(x, 150.0), "narrower than that of uint8 over a row's range (down to 0.8"),
    "groups": (lambda x: _symmetric(x.reshape(-1, K // 4, 4)).reshape(x.shape), "no linear or convolution"),
    "columns": (lambda x: _symmetric(x.reshape(6, K, 1)).reshape(6, K), "no linear or convolution"),
    "columns of samples": (
        lambda x: _symmetric(x.reshape(2, 3, K), dims=(0, 2)).reshape(6, K),
        "its scale is for dimensions [0, 2] of [2, 3, 32]",
    ),
    "other value": (
        lambda x: (lambda s: torch.round(x / s).clamp(-128, 127) * s)(x.square().amax(-1, keepdim=True) / 127 + 1e-9),
        "comes from another value than what is rounded",
    ),
    "deviation": (
        lambda x: (lambda s: torch.round(x / s).clamp(-128, 127) * s)(x.std(-1, keepdim=True) / 16 + 1e-9),
        "computed with aten.",
    ),
    "smallest": (
        lambda x: (lambda s: torch.round(x / s).clamp(-128, 127) * s)(x.abs().amin(-1, keepdim=True) + 1e-9),
        "the smallest magnitude",
    ),
    "double": (
        lambda x: (torch.round(x.double() / S).clamp(-128, 127) * S).cos().float(),
        "",
    ),
}  # fmt: skip
_CHANNELS, _ROWS = torch.linspace(0.01, 0.1, K), torch.linspace(0.01, 0.1, 6).reshape(6, 1)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_quantizer_of_the_kernels_stays(case: str, text: Any) -> None:
    rounding, reason = REFUSED[case]
    _, after, report = extracted(Model(rounding), inputs(6, K))
    assert not report.applied
    assert not any("quantize_dequantize" in line for line in text(after))
    assert [reason in entry.reason for entry in report.refused] == ([True] if reason else [])


def test_layers_that_the_recipe_leaves_in_float_keep_their_rounding() -> None:
    chosen = RECIPE.model_copy(update={"layers": (LayerRule(match="layer", weights=None),)})
    _, _, report = extracted(Model(STATIC["divided"]), inputs(6, K), recipe=chosen)
    assert not report.applied
    assert "no linear or convolution that the recipe quantizes" in report.refused[0].reason
