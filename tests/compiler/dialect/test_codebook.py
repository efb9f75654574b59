"""Additive codebooks: layout, round trips, AQLM's shapes, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect.packing_codebook import (
    CodebookMatrix,
    from_aqlm,
    pack_codebook,
    unpack_codebook,
    unpack_codebook_codes,
)
from isofold.compiler.errors import InputError


def matrix(n: int, k: int, count: int, bits: int, seed: int = 0) -> CodebookMatrix:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, -(-k // 8), count), generator=g, dtype=torch.int32)
    books = torch.randn(count, 2**bits, 8, generator=g).half().float()
    dtype = torch.uint8 if bits == 8 else torch.uint16
    return CodebookMatrix(codes.to(dtype), books, torch.rand(n, generator=g) + 0.1, k)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from([(1, 8), (2, 8), (8, 8), (1, 16)]),
    n=st.integers(1, 50),
    k=st.integers(1, 150),
    seed=st.integers(0, 2**20),
)
def test_codes_come_back_bit_for_bit_and_decode_alike(
    layout: tuple[int, int], n: int, k: int, seed: int
) -> None:
    given_ = matrix(n, k, *layout, seed=seed)
    packed = pack_codebook(given_)
    assert packed.layout == f"{layout[0]}x{layout[1]}"
    assert list(packed.weight.shape) == [-(-n // 16), -(-k // 32) * 4, 16, layout[0]]
    assert torch.equal(unpack_codebook_codes(packed.weight, n, k), given_.codes)
    decoded = unpack_codebook(packed.weight, packed.codebooks, packed.scale, n, k, torch.float64)
    assert torch.equal(decoded, given_.dequantized(torch.float64))


def test_layout_is_that_of_the_worked_example() -> None:
    codes = torch.tensor([[[3, 5], [7, 9]]], dtype=torch.uint8)
    packed = pack_codebook(CodebookMatrix(codes, torch.zeros(2, 256, 8), torch.ones(1), 16))
    assert packed.weight[0, :2, 0].tolist() == [[3, 5], [7, 9]]
    assert not packed.weight[0, 2:].any()
    assert not packed.weight[0, :, 1:].any()


def test_decoding_is_the_formula() -> None:
    given_ = matrix(5, 43, 2, 8)
    decoded = given_.dequantized(torch.float64)
    for row, column in ((0, 0), (4, 42), (2, 17)):
        vectors = [given_.codebooks[m, int(given_.codes[row, column // 8, m]), column % 8] for m in (0, 1)]
        expected = float(given_.scale[row]) * (float(vectors[0]) + float(vectors[1]))
        assert float(decoded[row, column]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "bits"), [(2, 8), (1, 16)])
def test_published_shapes_are_read_with_signed_and_unsigned_codes(count: int, bits: int) -> None:
    own = matrix(6, 64, count, bits)
    books = own.codebooks[:, :, None].half()
    scales = own.scale.reshape(-1, 1, 1, 1)
    signed = own.codes.view(torch.int8 if bits == 8 else torch.int16)
    for codes in (signed, own.codes.to(torch.int32)):
        got = from_aqlm(codes, books, scales)
        assert torch.equal(got.codes, own.codes)
        assert got.layout == f"{count}x{bits}"
        assert torch.equal(got.dequantized(), own.dequantized())


def test_what_does_not_fit_is_refused() -> None:
    own = matrix(6, 64, 2, 8)
    with pytest.raises(InputError, match=r"groups that no kernel reads[\s\S]*\[2, 256, 8, 1\]"):
        from_aqlm(own.codes, own.codebooks[..., None], own.scale)
    with pytest.raises(InputError, match=r"size that no kernel reads[\s\S]*got: 16"):
        from_aqlm(own.codes, own.codebooks[:, :16, None], own.scale)
    with pytest.raises(InputError, match=r"do not fit codebooks of 256"):
        from_aqlm(own.codes.to(torch.int64) + 1000, own.codebooks[:, :, None], own.scale)
    with pytest.raises(InputError, match=r"do not fit each other[\s\S]*K = 80"):
        from_aqlm(own.codes, own.codebooks[:, :, None], own.scale, k=80)
    for change, message in (
        ({"codebooks": own.codebooks.clone().fill_(torch.inf)}, "NaN or infinity"),
        ({"scale": own.scale * torch.nan}, "NaN or infinity"),
        ({"codebooks": own.codebooks + 1e-5}, "not representable"),
        ({"codes": own.codes.to(torch.int32)}, "wrong type"),
    ):
        with pytest.raises(InputError, match=message):
            pack_codebook(CodebookMatrix(**{**vars(own), **change}))  # type: ignore[arg-type]  # fields by name
