"""Rounding matrices: errors are bounded, the search never loses, stored scales are the scales used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect.packing import code_range, pack_linear, storable_scale
from isofold.passes.ranges import dequantized, quantize_matrix, requantized

FORMAT = st.sampled_from([(b, g) for b in (2, 3, 4, 8) for g in (0, 32, 64, 128) if g or b >= 4])


def matrix(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator) + (seed % 3 - 1)
    rows[seed % n] *= 1e-3
    rows[:, seed % k] *= 20
    return rows


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 20),
    k=st.integers(1, 200),
    form=FORMAT,
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_absmax_is_within_half_a_step_and_packs(
    n: int, k: int, form: tuple[int, int], symmetric: bool, seed: int
) -> None:
    bits, group_size = form
    weight = matrix(n, k, seed)
    found = quantize_matrix(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, search="absmax", storable=True
    )
    low, high = code_range(bits, symmetric)
    assert int(found.codes.min()) >= low
    assert int(found.codes.max()) <= high
    assert torch.equal(storable_scale(found.scale, group_size)[0], found.scale)
    pack_linear(found.codes, found.scale, found.zero, bits, group_size)
    step = found.scale.repeat_interleave(group_size or k, 1)[:, :k]
    # A stored float16 scale may cover 2^-11 less than the range; a whole zero point moves the ends by half a step.
    room = (0.5 if symmetric else 1.0) + high * 2.0**-10
    difference = (dequantized(found, group_size) - weight).abs()
    assert (difference <= room * step + 1e-6 * weight.abs().max()).all()
    measured = float(difference.double().square().sum().sqrt() / weight.double().square().sum().sqrt())
    assert found.error == pytest.approx(measured, rel=1e-3)


@settings(deadline=None, max_examples=40)
@given(form=FORMAT, symmetric=st.booleans(), seed=st.integers(0, 99))
def test_the_search_never_loses_to_absmax(form: tuple[int, int], symmetric: bool, seed: int) -> None:
    bits, group_size = form
    weight = matrix(7, 150, seed)
    errors = [
        quantize_matrix(
            weight, bits=bits, group_size=group_size, symmetric=symmetric, search=search, storable=False
        ).error
        for search in ("absmax", "mse")
    ]
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_the_search_gains_at_four_bits() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain, searched = (
        quantize_matrix(weight, bits=4, group_size=32, symmetric=True, search=search, storable=True).error
        for search in ("absmax", "mse")
    )
    assert searched < 0.87 * plain


@pytest.mark.parametrize(("bits", "without", "within"), [(2, 0.34, 0.3), (3, 0.165, 0.147)])
def test_few_bits_gain_by_zero_points_between_codes(bits: int, without: float, within: float) -> None:
    weight = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    plain, centred = (
        quantize_matrix(weight, bits=bits, group_size=32, symmetric=symmetric, search="mse", storable=True)
        for symmetric in (True, False)
    )
    assert plain.error < without
    assert centred.error < within
    assert centred.zero is not None
    assert torch.equal(centred.zero * 16, (centred.zero * 16).round())
    again = requantized(weight, centred, bits=bits, group_size=32)
    assert torch.equal(again, dequantized(centred, 32))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_rows_constant_rows_and_tiny_groups(bits: int) -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3, :32], weight[3, 32:] = 3.0, -3.0, 1e-9, 1.0
    for symmetric in (True, False):
        found = quantize_matrix(
            weight, bits=bits, group_size=32, symmetric=symmetric, search="mse", storable=True
        )
        again = dequantized(found, 32)
        assert not again[0].any()
        assert torch.allclose(again[1:3], weight[1:3], rtol=1e-2)
        assert torch.isfinite(again).all()
        assert float((again[3] - weight[3]).abs().max()) < 1e-2


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(40, 96, 1)
    results = []
    for chunk in (1, 5 * 96, 1 << 20):
        monkeypatch.setattr("isofold.passes.ranges.CHUNK", chunk)
        results.append(
            quantize_matrix(weight, bits=4, group_size=32, symmetric=False, search="mse", storable=True)
        )
    assert all(torch.equal(r.codes, results[0].codes) for r in results)
    assert all(torch.equal(r.scale, results[0].scale) for r in results)


def test_the_weight_is_not_written_to() -> None:
    weight = matrix(9, 70, 3)
    before = weight.clone()
    quantize_matrix(weight, bits=4, group_size=32, symmetric=False, search="mse", storable=True)
    assert torch.equal(weight, before)
