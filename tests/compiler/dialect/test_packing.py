"""Packing: exact both ways for every shape, laid out as docs/dialect.md says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect import packing
from isofold.compiler.errors import InputError

WIDTHS = st.sampled_from([2, 3, 4, 8])
GROUP = st.sampled_from([0, 32, 64, 128])
FORMAT = st.sampled_from([(b, g) for b in (2, 3, 4, 8) for g in (0, 32, 64, 128) if g or b >= 4])


def codes_for(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    low, high = packing.code_range(bits, symmetric=False)
    return torch.randint(
        low, high + 1, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 70), k=st.integers(1, 200), bits=WIDTHS, group_size=GROUP, seed=st.integers(0, 99))
def test_codes_survive_packing_and_follow_the_index_formula(
    n: int, k: int, bits: int, group_size: int, seed: int
) -> None:
    codes = codes_for(n, k, bits, seed)
    packed = packing.pack_codes(codes, bits, group_size)
    rows = packing.ceil_to(n, 16)
    columns = packing.ceil_to(k, max(32, group_size))
    planes = [columns // 32, 3] if bits == 3 else [columns * bits // 32]
    assert list(packed.shape) == [rows // 16, *planes, 16, 4]
    assert packed.numel() == rows * columns * bits // 8
    assert torch.equal(packing.unpack_codes(packed, n, k, bits), codes)
    everything = packing.unpack_codes(packed, rows, columns, bits)
    assert not everything[n:].any()
    assert not everything[:, k:].any()
    row, column = seed % n, (7 * seed) % k
    if bits == 8:
        assert packed[row // 16, column // 4, row % 16, column % 4] == codes[row, column]
        return
    if bits == 3:
        first, second, third = (
            int(packed[row // 16, column // 32, p, row % 16, column % 4]) for p in range(3)
        )
        q = column % 32 // 4
        field = (
            [first >> 5, first >> 2, second >> 5, second >> 2, third >> 5, third >> 2][q]
            if q < 6
            else [first, second][q - 6] % 4 + 4 * ((third >> (q - 6)) % 2)
        )
    else:
        step = 32 // bits
        byte = int(packed[row // 16, column // step, row % 16, column % 4])
        field = byte >> (bits * (column % step // 4))
    half = 1 << (bits - 1)
    assert (field % (2 * half) ^ half) - half == int(codes[row, column])


def test_the_example_of_the_documentation() -> None:
    codes = torch.tensor([[0, 1, 2, 3, -1, -2, -3, -4]], dtype=torch.int8)
    assert packing.pack_codes(codes, 4, 0)[0, 0, 0].tolist() == [0xF0, 0xE1, 0xD2, 0xC3]
    codes = torch.tensor([[0, 1, -2, -1]], dtype=torch.int8).repeat_interleave(4, 1)
    assert packing.pack_codes(codes, 2, 32)[0, 0, 0].tolist() == [0b11_10_01_00] * 4
    codes = torch.tensor([[0, 1, 2, 3, -4, -3, -2, -1]], dtype=torch.int8).repeat_interleave(4, 1)
    planes = [[0b000_001_10] * 4, [0b010_011_11] * 4, [0b100_101_11] * 4]
    assert packing.pack_codes(codes, 3, 32)[0, 0, :, 0].tolist() == planes


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    form=FORMAT,
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_packed_linear_decodes_to_the_dequantized_weight(
    n: int, k: int, form: tuple[int, int], zeros: bool, seed: int
) -> None:
    bits, group_size = form
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size) if group_size else 1
    scale, _ = packing.storable_scale(
        torch.rand(n, groups, generator=generator) * 10.0 ** (seed % 7 - 5), group_size
    )
    low, high = packing.code_range(bits, symmetric=False)
    zero = torch.randint(low, high + 1, (n, groups), generator=generator, dtype=torch.int8) if zeros else None
    if zero is not None and packing.zero_steps(bits) > 1:
        zero = torch.randint(-128, 128, (n, groups), generator=generator) / packing.zero_steps(bits)
    codes = codes_for(n, k, bits, seed)
    p = packing.pack_linear(codes, scale, zero, bits, group_size)
    expected = packing.dequantize(codes, scale.double(), zero, group_size)
    decoded = packing.unpack_weight(
        p.weight, p.scale, p.zero, n, k, bits, group_size, p.scale_multiplier, torch.float64
    )
    assert torch.equal(decoded, expected)
    assert torch.allclose(
        p.wsum[:n].double(), expected.sum(1), rtol=1e-6, atol=1e-6 * float(expected.abs().sum(1).max())
    )
    assert not p.wsum[n:].any()
    assert p.scale.dtype == (torch.float16 if group_size else torch.float32)


@settings(deadline=None, max_examples=60)
@given(exponent=st.integers(-30, 20), seed=st.integers(0, 99))
def test_storable_scales_are_stable_and_precise(exponent: int, seed: int) -> None:
    scale = (0.001 + torch.rand(5, 3, generator=torch.Generator().manual_seed(seed))) * 2.0**exponent
    stored, multiplier = packing.storable_scale(scale, 32)
    assert torch.equal(packing.storable_scale(stored, 32)[0], stored)
    assert 0.5 <= float(stored.max()) / multiplier <= 1
    assert float(((stored - scale) / scale).abs().max()) <= 2.0**-11
    assert packing.storable_scale(scale, 0)[0] is scale


@settings(deadline=None, max_examples=40)
@given(v=st.integers(1, 40), d=st.integers(1, 70), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_embedding_codes_survive_packing(v: int, d: int, bits: int, seed: int) -> None:
    codes = codes_for(v, d, bits, seed)
    packed = packing.pack_embedding_codes(codes, bits)
    assert packed.shape == (v, d if bits == 8 else (d + 1) // 2)
    assert torch.equal(packing.unpack_embedding_codes(packed, d, bits), codes)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 50), seed=st.integers(0, 99))
def test_gated_rows_interleave_and_split(n: int, seed: int) -> None:
    gate, up = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed))
    rows = packing.interleave_gated(gate, up)
    assert rows.shape[0] == 2 * packing.ceil_to(n, 16)
    again = packing.split_gated(rows, n)
    assert torch.equal(again[0], gate)
    assert torch.equal(again[1], up)
    assert torch.equal(rows[0], gate[0])
    assert torch.equal(rows[16], up[0])


def test_scales_that_cannot_be_stored_are_refused_with_what_to_do() -> None:
    codes = torch.ones(1, 64, dtype=torch.int8)
    with pytest.raises(InputError, match=r"not representable in the packed layout[\s\S]*storable_scale"):
        packing.pack_linear(codes, torch.tensor([[1.0, 1 / 3]]), None, 4, 32)


def test_zero_points_that_cannot_be_stored_are_refused() -> None:
    codes, scale = torch.ones(1, 64, dtype=torch.int8), torch.ones(1, 2)
    for bits, zero in ((2, 1 / 32), (3, 8.0), (2, -8.0625), (4, 0.5)):
        with pytest.raises(InputError, match="Zero points are not representable"):
            packing.pack_linear(codes, scale, torch.tensor([[0.0, zero]]), bits, 32)


@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_without_groups_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="stored in groups"):
        packing.pack_linear(torch.zeros(1, 64, dtype=torch.int8), torch.ones(1, 1), None, bits, 0)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.full((1, 32), 2, dtype=torch.int8), 2, "Codes do not fit 2 bits"),
        (torch.full((1, 32), -5, dtype=torch.int8), 3, "Codes do not fit 3 bits"),
        (torch.full((1, 32), 9, dtype=torch.int8), 4, "Codes do not fit 4 bits"),
        (torch.zeros(1, 32), 8, "Codes to pack have the wrong type"),
        (torch.zeros(1, 32, dtype=torch.int8), 5, "Unknown weight width"),
    ],
)
def test_codes_that_do_not_fit_are_errors(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        packing.pack_codes(codes, bits, 0)
