"""Packing: exact both ways for every shape, laid out as docs/dialect.md says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect import packing
from isofold.compiler.errors import InputError

BITS = st.sampled_from([4, 8])
GROUP = st.sampled_from([0, 32, 64, 128])


def codes_for(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    low, high = packing.code_range(bits, symmetric=False)
    return torch.randint(
        low, high + 1, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 70), k=st.integers(1, 200), bits=BITS, group_size=GROUP, seed=st.integers(0, 99))
def test_codes_survive_packing_and_follow_the_index_formula(
    n: int, k: int, bits: int, group_size: int, seed: int
) -> None:
    codes = codes_for(n, k, bits, seed)
    packed = packing.pack_codes(codes, bits, group_size)
    rows = packing.ceil_to(n, 16)
    columns = packing.ceil_to(k, max(32, group_size))
    assert list(packed.shape) == [rows // 16, columns * bits // 32, 16, 4]
    assert torch.equal(packing.unpack_codes(packed, n, k, bits), codes)
    everything = packing.unpack_codes(packed, rows, columns, bits)
    assert not everything[n:].any()
    assert not everything[:, k:].any()
    row, column = seed % n, (7 * seed) % k
    if bits == 8:
        assert packed[row // 16, column // 4, row % 16, column % 4] == codes[row, column]
    else:
        byte = int(packed[row // 16, column // 8, row % 16, column % 4])
        nibble = byte >> 4 if column % 8 >= 4 else byte & 15
        assert (nibble ^ 8) - 8 == int(codes[row, column])


def test_the_example_of_the_documentation() -> None:
    codes = torch.tensor([[0, 1, 2, 3, -1, -2, -3, -4]], dtype=torch.int8)
    assert packing.pack_codes(codes, 4, 0)[0, 0, 0].tolist() == [0xF0, 0xE1, 0xD2, 0xC3]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    bits=BITS,
    group_size=GROUP,
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_packed_linear_decodes_to_the_dequantized_weight(
    n: int, k: int, bits: int, group_size: int, zeros: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size) if group_size else 1
    scale, _ = packing.storable_scale(
        torch.rand(n, groups, generator=generator) * 10.0 ** (seed % 7 - 5), group_size
    )
    low, high = packing.code_range(bits, symmetric=False)
    zero = torch.randint(low, high + 1, (n, groups), generator=generator, dtype=torch.int8) if zeros else None
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
@given(v=st.integers(1, 40), d=st.integers(1, 70), bits=BITS, seed=st.integers(0, 99))
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


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.full((1, 32), 9, dtype=torch.int8), 4, "Codes do not fit 4 bits"),
        (torch.zeros(1, 32), 8, "Codes to pack have the wrong type"),
        (torch.zeros(1, 32, dtype=torch.int8), 3, "Unknown weight width"),
    ],
)
def test_codes_that_do_not_fit_are_errors(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        packing.pack_codes(codes, bits, 0)
