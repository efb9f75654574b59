"""Codebooks fitted to weights, imported, packed; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import InputError
from isofold.compiler.program import Program
from isofold.compiler.recipe import PRESETS, Recipe, WeightFormat
from isofold.passes.code_ranges import relative_error
from isofold.passes.codebooks import fit_codebooks
from isofold.passes.pack_codebook_linears import pack_codebook_linears
from isofold.passes.pipeline import plan
from isofold.passes.quantize_codebooks import import_codebooks, quantize_codebooks

OPS: Any = torch.ops.isofold
TWO = PRESETS["w2-codebook"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(program: Program, target: Any) -> int:
    return sum(n.target == target for n in program.graph.nodes)


def test_more_codebooks_leave_less_error_and_rows_may_differ_in_size() -> None:
    weight = normal(96, 512) * torch.logspace(-3, 3, 96)[:, None]
    errors = {}
    for layout in ((1, 8), (2, 8), (3, 8)):
        rounded = fit_codebooks(weight, *layout).dequantized()
        rows = [relative_error(weight[i], rounded[i]) for i in range(96)]
        errors[layout[0]] = sum(rows) / 96
    # Rate distortion allows 2^-b for normal weights at b bits: 0.5, 0.25 and 0.125.
    assert 0.5 < errors[1] < 0.62
    assert 0.25 < errors[2] < 0.4
    assert 0.125 < errors[3] < 0.25


def test_a_matrix_of_few_vectors_is_found_exactly_and_the_result_repeats() -> None:
    vectors = normal(16, 8).half().float()
    index = torch.randint(0, 16, (64, 8), generator=torch.Generator().manual_seed(1))
    weight = vectors[index].flatten(1)
    found = [fit_codebooks(weight, 1, 8) for _ in range(2)]
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].codebooks, found[1].codebooks)
    # Rows have different norms, so scaled copies of the vectors need more than 16 entries.
    assert relative_error(weight, found[0].dequantized()) < 0.15


def test_zero_rows_and_ragged_widths() -> None:
    weight = normal(40, 37)
    weight[3] = 0
    weight[5] *= 1e-25
    weight[7] *= 1e25
    rounded = fit_codebooks(weight, 2, 8).dequantized()
    assert rounded.shape == weight.shape
    assert torch.isfinite(rounded).all()
    assert not rounded[3].any()


class Mlp(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.small = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.b(torch.relu(self.a(x))))


def test_linears_are_fitted_and_packed_and_small_ones_refused() -> None:
    model, x = Mlp().eval(), normal(3, 128)
    program, reports = run_steps(
        capture(model, (x,)), [Step(quantize_codebooks, {"recipe": TWO}), Step(pack_codebook_linears)]
    )
    assert count(program, OPS.linear_codebook.default) == 2
    quantized, packed = reports
    assert packed.error is not None
    assert packed.error <= 1e-12
    facts = [a.facts for a in quantized.applied]
    assert [f["bytes_after"] for f in facts] == [a.facts["bytes_after"] for a in packed.applied]
    assert {f["format"] for f in facts} == {"codebook 2x8"}
    assert all(0.1 < f["weight_error"] < 0.4 for f in facts)
    assert "too small" in quantized.refused[0].reason


def aqlm(n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(-128, 128, (n, k // 8, 2), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )
    return codes, normal(2, 256, 1, 8, seed=seed).half(), normal(n, 1, 1, 1, seed=seed).abs() + 0.1


def test_published_codes_replace_weights_and_survive_the_pipeline() -> None:
    model, x = Mlp().eval(), normal(3, 128)
    given = {"a": aqlm(128, 128, 1), "b": aqlm(128, 128, 2)}
    for path, (codes, books, scales) in given.items():
        index = codes.to(torch.int64) % 256
        vectors = books[0, index[..., 0], 0].float() + books[1, index[..., 1], 0].float()
        getattr(model, path).weight.data = vectors.flatten(1) * scales.reshape(-1, 1)
    expected = model(x).detach()
    fresh = import_codebooks(capture(Mlp().eval(), (x,)), matrices=given)
    assert len(fresh.report.applied) == 2
    assert torch.allclose(fresh.program(x), expected, rtol=1e-3, atol=1e-3)
    program, reports = run_steps(fresh.program, plan(fresh.program, TWO))
    assert count(program, OPS.linear_codebook.default) == 2
    assert torch.allclose(program(x), expected, rtol=1e-3, atol=1e-3)
    assert not next(r for r in reports if r.name == "quantize_codebooks").applied
    exact = import_codebooks(capture(model, (x,)), matrices=given)
    assert max(a.facts["weight_error"] for a in exact.report.applied) < 1e-6


def test_codes_that_fit_no_layer_are_listed_together() -> None:
    program = capture(Mlp().eval(), (normal(3, 128),))
    given = {"aa": aqlm(128, 128, 1), "b": aqlm(64, 128, 2), "a": aqlm(128, 64, 3)}
    with pytest.raises(InputError) as caught:
        import_codebooks(program, matrices=given)
    text = str(caught.value)
    assert "'aa' is no linear (did you mean 'a'?)" in text
    assert "'b': codes of 64 rows for 128 output features" in text
    assert "'a': Codes, codebooks and scales do not fit each other" in text


def test_canonicalization_leaves_compressed_weights_compressed() -> None:
    program = import_codebooks(
        capture(Mlp().eval(), (normal(3, 128),)), matrices={"a": aqlm(128, 128, 1)}
    ).program
    assert count(canonicalize(program).program, OPS.dequantize_codebook.default) == 1


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = Mlp()
    with torch.no_grad():
        model.a.weight[0, 0] = torch.nan
    recipe = Recipe(weights=WeightFormat(format="codebook", codebooks=1))
    with pytest.raises(InputError, match=r"NaN or infinity[\s\S]*'a.weight'"):
        quantize_codebooks(capture(model.eval(), (normal(3, 128),)), recipe=recipe)
