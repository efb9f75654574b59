"""Weights that lie on a grid: codes and scales are found again, whatever made them; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import isofold
from isofold.compiler.dialect.packing import dequantize
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError, RecipeError
from isofold.compiler.recipe import PRESETS, Recipe, resolve
from isofold.passes.code_ranges import quantize_codes
from isofold.passes.extract_codes import extract_codes
from isofold.passes.grids import element_grid, integer_grid, significant_bits

PREQUANTIZED = PRESETS["prequantized"]
TYPES = {8: torch.bfloat16, 11: torch.float16, 24: torch.float32}


def rounded(
    weight: Tensor, bits: int, group: int, zeros: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`weight` `[N, K]` as tools for weight-only quantization write it: absolute maximum, or minimum and maximum."""
    g = weight.unflatten(1, (-1, group or weight.shape[1]))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if zeros:
        least, most = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        scale = ((most - least) / (high - low)).to(dtype).float()
        zero = (low - least / scale).round().clamp(low, high)
    else:
        scale = (g.abs().amax(-1, keepdim=True) / max(high, 1)).to(dtype).float()
        zero = torch.zeros(())
    codes = ((g / scale).round() + zero).clamp(low, high)
    return (scale * (codes - zero)).to(dtype).float().flatten(1)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([0, 32, 64, 128]),
    zeros=st.booleans(),
    precision=st.sampled_from([24, 11, 8]),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([1e-4, 1.0, 300.0]),
)
def test_codes_are_found_again(
    bits: int, group: int, zeros: bool, precision: int, rows: int, seed: int, magnitude: float
) -> None:
    if (bits < 4 and not group) or (bits == 8 and precision == 8):
        return  # int2 and int3 have no whole rows; bfloat16 is coarser than int8 of a range
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)) * magnitude
    written = rounded(weight, bits, group, zeros, TYPES[precision])
    found = integer_grid(written, bits, group, significant_bits(written))
    assert found is not None
    again = dequantize(found.codes, found.scale, found.zero, group)
    # Bit by bit in the type that the values were written in; one rounding of the scale in float32.
    if precision < 24:
        assert torch.equal(again.to(TYPES[precision]).float(), written)
    torch.testing.assert_close(again, written, rtol=2.0**-precision, atol=0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert int(found.codes.min()) >= low
    assert int(found.codes.max()) <= high
    if not zeros and precision == 24:
        assert found.zero is None


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nf4", 64),
        ("e4m3", 0),
        ("e4m3", 128),
        ("e5m2", 32),
        ("mxfp4", 32),
        ("mxfp6_e2m3", 32),
        ("mxfp8_e4m3", 32),
    ],
)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_codes_of_small_floats_are_found_again(name: str, group: int, search: str) -> None:
    written = quantize_codes(torch.randn(40, 256), name, group, search).dequantized()
    found = element_grid(written, name, group, significant_bits(written))
    assert found is not None
    torch.testing.assert_close(found.dequantized(), written, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_not_rounded_lies_on_no_grid(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256).to(dtype).float()
    precision = significant_bits(weight)
    assert all(integer_grid(weight, b, g, precision) is None for b in (4, 8) for g in (0, 32, 128))
    assert element_grid(weight, "nf4", 64, precision) is None
    almost = rounded(weight, 4, 32)
    almost[40, 100] += 0.4 * almost.abs().max()
    assert integer_grid(almost, 4, 32, 24) is None


def made(weight: Tensor, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight.data = weight
    return linear.eval()


def applied(module: nn.Module, *args: Tensor, recipe: Recipe = PREQUANTIZED) -> tuple[Any, Any]:
    program, reports = run_steps(isofold.capture(module, args), [Step(extract_codes, {"recipe": recipe})])
    return program, reports[0]


SCALES = {
    "per tensor, ternary": (lambda w: w.sign() * (w.abs() > 0.5) * 0.037, "int2, groups of 128"),
    "int4 row": (lambda w: rounded(w, 4, 0), "int4, one scale a row"),
    "int4 zeros": (lambda w: rounded(w, 4, 64, zeros=True), "int4, groups of 64, zero points"),
    "int8 row": (lambda w: rounded(w, 8, 0), "int8, one scale a row"),
    "blocks of 128x128": (
        lambda w: quantize_codes(w, "e4m3", 128, "absmax").dequantized(),
        "e4m3, groups of 128",
    ),
    "mxfp4": (lambda w: quantize_codes(w, "mxfp4", 32, "absmax").dequantized(), "mxfp4, groups of 32"),
}


@pytest.mark.parametrize("kind", SCALES)
def test_the_narrowest_format_and_the_largest_group_are_taken(kind: str) -> None:
    write, wanted = SCALES[kind]
    _program, report = applied(made(write(torch.randn(48, 256))), torch.randn(3, 256))
    (entry,) = report.applied
    assert entry.what.startswith(f"weight already is {wanted}, relative error ")
    assert entry.facts["weight_error"] < 2.0**-11
    assert report.refused == []


def test_refusals_say_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.small = made(torch.randn(64, 64)), made(rounded(torch.randn(1, 64), 8, 0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.plain(x), self.small(x)

    _, report = applied(Model(), torch.randn(2, 64))
    plain, small = (entry.reason for entry in report.refused)
    assert plain.startswith("its weight lies on no grid that can be packed (integers, NF4, FP8 or MX, ")
    assert small.startswith("too small: it takes 256 bytes in float and ")


def test_weights_with_nan_are_named() -> None:
    bad = made(rounded(torch.randn(64, 64), 8, 0))
    bad.weight.data[0, 0] = torch.nan
    program = isofold.capture(bad, (torch.randn(2, 64),))
    with pytest.raises(InputError, match=r"(?s)NaN or infinity.*1 of 4096 values"):
        run_steps(program, [Step(extract_codes, {"recipe": PREQUANTIZED})], verify=False)


class Rounded(nn.Module):
    """Codes and scales as tools keep them, in several spellings."""

    def __init__(self, call: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.call, self.names = call, list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *(getattr(self, name) for name in self.names))


def _codes(bits: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (96, 64), dtype=torch.int8)
    return codes, torch.rand(96, 1) * 0.01 + 0.001


CODES, SCALE = _codes(8)
SPELLINGS = {
    "decoded first": Rounded(lambda x, q, s: F.linear(x, q.float() * s), q=CODES, s=SCALE),
    "scaled behind the product": Rounded(
        lambda x, q, s: F.linear(x, q.float()) * s.view(-1), q=CODES, s=SCALE
    ),
    "divided": Rounded(lambda x, q, s: x @ (q.float() / (1 / s)).T, q=CODES, s=SCALE),
    "fake quantization": Rounded(
        lambda x, w, s: F.linear(
            x, torch.fake_quantize_per_channel_affine(w, s, torch.zeros(96).int(), 0, -128, 127)
        ),
        w=CODES * SCALE + 0.3 * SCALE * (torch.rand(96, 64) - 0.5),
        s=SCALE.view(-1),
    ),
    "rounded in the graph": Rounded(
        lambda x, w, s: F.linear(x, (w / s).round().clamp(-128, 127) * s),
        w=CODES * SCALE + 0.3 * SCALE * (torch.rand(96, 64) - 0.5),
        s=SCALE,
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("target", ["cpu", "tvm-cpu"])
def test_spellings_end_in_packed_codes(spelling: str, target: str) -> None:
    module, x = SPELLINGS[spelling], torch.randn(5, 64)
    compiled = isofold.compile(module, args=(x,), recipe="prequantized", target=target)
    torch.testing.assert_close(torch.as_tensor(compiled(x)), module(x), rtol=1e-4, atol=1e-4)
    (layer,) = [row for row in compiled.report["layers"] if row["kind"] == "weights"]
    assert (layer["bits"], layer["bytes_after"] < layer["bytes_before"] / 3) == (8, True)


def test_activations_may_be_quantized_on_the_way() -> None:
    x = torch.randn(5, 64)
    compiled = isofold.compile(SPELLINGS["decoded first"], args=(x,), recipe="prequantized-a8")
    wanted = SPELLINGS["decoded first"](x)
    error = float((torch.as_tensor(compiled(x)) - wanted).norm() / wanted.norm())
    assert 1e-4 < error < 2e-2


def test_embeddings_and_tied_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 64)
            self.table.weight.data = rounded(torch.randn(96, 64), 4, 32)
            self.head = made(torch.randn(96, 64), bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    model, ids = Model().eval(), torch.randint(0, 96, (2, 7))
    compiled = isofold.compile(model, args=(ids,), recipe="prequantized")
    got, wanted = torch.as_tensor(compiled(ids)), model(ids)
    assert float((got - wanted).norm() / wanted.norm()) < 2.0**-11  # scales of groups are stored as float16
    assert {row["kind"]: row["bits"] for row in compiled.report["layers"]} == {"embeddings": 4, "weights": 4}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"weights": {"format": "prequantized", "bits": 4}}, "format prequantized has no bits"),
        ({"embeddings": {"format": "prequantized", "range": "mse"}}, "format prequantized has no range"),
        (
            {"weights": {"format": "prequantized"}, "fold": {"rotation": "hadamard"}},
            "fold moves weights off the grid that format prequantized reads",
        ),
    ],
)
def test_recipes_that_contradict_themselves(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        resolve(given)


def test_the_preset_survives_yaml() -> None:
    for name in ("prequantized", "prequantized-a8"):
        assert Recipe.from_yaml(PRESETS[name].to_yaml()) == PRESETS[name]
