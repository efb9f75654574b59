"""Formats of codes: every value against torch's dtypes and the specifications, rounding, layouts, refusals."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isofold.compiler.dialect import packing
from isofold.compiler.dialect.element_formats import FORMATS, NF4, decode, encode, scale_values
from isofold.compiler.dialect.packing_coded import (
    CodedMatrix,
    pack_bits,
    pack_coded,
    unpack_bits,
    unpack_coded,
)
from isofold.compiler.errors import InputError

SMALL_FLOATS = [name for name, form in FORMATS.items() if not form.is_table]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_values_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    expected = torch.arange(256).to(torch.uint8).view(dtype).double()
    values = FORMATS[name].values()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())


def test_values_of_the_specifications() -> None:
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FORMATS["mxfp4"].values().tolist() == [*e2m1, *(-v for v in e2m1)]
    largest = {
        "mxfp6_e3m2": 28.0,
        "mxfp6_e2m3": 7.5,
        "nvfp4": 6.0,
        "mxfp8_e4m3": 448.0,
        "mxfp8_e5m2": 57344.0,
    }
    assert {name: FORMATS[name].largest for name in largest} == largest
    exponents = {"mxfp4": 2, "mxfp6_e3m2": 4, "mxfp6_e2m3": 2, "mxfp8_e4m3": 8, "mxfp8_e5m2": 15}
    assert {name: FORMATS[name].largest_exponent for name in exponents} == exponents
    smallest = {"mxfp4": 0.5, "mxfp6_e3m2": 0.0625, "mxfp6_e2m3": 0.125, "e4m3": 2.0**-9, "e5m2": 2.0**-16}
    for name, expected in smallest.items():
        values = FORMATS[name].values()
        assert float(values[values > 0].min()) == expected
    assert torch.equal(FORMATS["nf4"].values(), torch.tensor(NF4, dtype=torch.float64))


def test_nf4_is_the_quantiles_that_qlora_derives() -> None:
    """Quantiles of a normal distribution with 8 positive and 7 negative entries beside zero, offset 0.9677083."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    entries = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    assert torch.allclose(entries / entries.max(), FORMATS["nf4"].values(), atol=1e-7)


def test_scales_of_e8m0_and_e4m3() -> None:
    codes = torch.tensor([0, 127, 128, 254, 255], dtype=torch.uint8)
    values = scale_values(codes, FORMATS["mxfp4"], torch.float64)
    assert values[:4].tolist() == [2.0**-127, 1.0, 2.0, 2.0**127]
    assert math.isnan(values[4])
    assert scale_values(
        torch.tensor([0x38, 0x7E], dtype=torch.uint8), FORMATS["nvfp4"], torch.float32
    ).tolist() == [
        1.0,
        448.0,
    ]


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "table4"])
def test_every_finite_code_survives_decoding_and_encoding(name: str) -> None:
    form = FORMATS[name]
    values = form.values()
    finite = torch.nonzero(values.isfinite()).flatten()
    back = values[encode(values[finite].float(), form).long()]
    assert torch.equal(back, values[finite])


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_ties_go_to_the_even_code_and_beyond_the_end_saturates(name: str) -> None:
    form = FORMATS[name]
    values = form.values()
    half = values[: 2 ** (form.bits - 1)]
    half = half[half.isfinite()]
    for sign in (1.0, -1.0):
        codes = encode(sign * ((half[:-1] + half[1:]) / 2).float(), form).long() % 2 ** (form.bits - 1)
        assert (codes % 2 == 0).all()
        just = torch.nextafter((half[:-1] + half[1:]) / 2, torch.tensor(math.inf).double()).float()
        wide = just * (1 + 1e-6)
        assert torch.equal(decode(encode(sign * wide, form), form, torch.float64), sign * half[1:])
        ends = torch.tensor([sign * form.largest * 1.5, sign * 3e38])
        assert decode(encode(ends, form), form, torch.float64).tolist() == [sign * form.largest] * 2


def test_ties_of_tables_go_to_the_lower_entry_in_any_order_of_entries() -> None:
    table = torch.arange(16).float().flip(0)
    x = torch.tensor([-5.0, 0.5, 3.5, 3.75, 99.0])
    codes = encode(x, FORMATS["table4"], table)
    assert decode(codes, FORMATS["table4"], torch.float32, table).tolist() == [0.0, 0.0, 3.0, 4.0, 15.0]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(list(FORMATS)),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
)
def test_encoding_is_the_nearest_value(name: str, bits: list[int]) -> None:
    """Any finite float32: no value of the format is nearer than the chosen one."""
    form = FORMATS[name]
    floats = [struct.unpack("f", struct.pack("I", b))[0] for b in bits]
    x = torch.tensor([v for v in floats if math.isfinite(v)] or [0.0])
    table = torch.linspace(-3, 5, 16) if name == "table4" else None
    values = form.values(table)
    chosen = decode(encode(x, form, table), form, torch.float64, table)
    nearest = (values[values.isfinite()][None] - x.double()[:, None]).abs().min(1).values
    # A boundary between two entries of a table is itself rounded to float32.
    slack = 1e-6 if form.is_table else 0.0
    assert ((chosen - x.double()).abs() <= nearest + slack).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        encode(torch.tensor([0.0, value]), FORMATS["mxfp4"])


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 6, 8]),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    align=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**20),
)
def test_codes_come_back_bit_for_bit(bits: int, n: int, k: int, align: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits, align)
    width = packing.ceil_to(k, align)
    assert packed.numel() == packing.ceil_to(n, 16) * width * bits // 8
    assert torch.equal(unpack_bits(packed, n, k, bits), codes)


def test_layouts_are_those_of_the_worked_examples() -> None:
    one = torch.arange(8).to(torch.uint8)[None]
    assert pack_bits(one, 4, 32)[0, 0, 0].tolist() == [0x40, 0x51, 0x62, 0x73]
    assert pack_bits(one, 8, 32)[0, :4, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    six = torch.tensor([[0x21, 0x12, 0x03, 0x34, 0, 0, 0, 0]], dtype=torch.uint8)
    words = pack_bits(six, 6, 32)[0, :3, 0].flatten().view(torch.int16)
    assert [hex(w) for w in words.tolist()] == ["0x4321", "0x0", "0xc6"]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_layouts_are_their_formulas(bits: int) -> None:
    n, k = 40, 75
    c = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    packed = pack_bits(c, bits, 32)
    full = torch.zeros(48, 96, dtype=torch.int64)
    full[:n, :k] = c
    for row in (0, 15, 16, 39, 47):
        b, r = divmod(row, 16)
        for s in range(96 // 8):
            if bits == 4:
                got = packed[b, s, r].tolist()
                assert got == [int(full[row, 8 * s + j] | full[row, 8 * s + 4 + j] << 4) for j in range(4)]
            elif bits == 8:
                assert packed[b, s, r].tolist() == full[row, 2 * s : 2 * s + 2].tolist()
            else:
                words = [int(w[0]) | int(w[1]) << 8 for w in packed[b, 3 * s : 3 * s + 3, r]]
                eight = full[row, 8 * s : 8 * s + 8].tolist()
                assert words == [
                    sum((eight[i] & 15) << 4 * i for i in range(4)),
                    sum((eight[4 + i] & 15) << 4 * i for i in range(4)),
                    sum((eight[i] >> 4) << 2 * i for i in range(8)),
                ]


def matrix(name: str, group: int, n: int = 21, k: int = 100) -> CodedMatrix:
    form = FORMATS[name]
    table = torch.randn(16) if name == "table4" else None
    finite = torch.nonzero(form.values(table).isfinite()).flatten()
    codes = finite[torch.randint(0, len(finite), (n, k))].to(torch.uint8)
    groups = -(-k // group) if group else 1
    if form.scale == "float":
        scale = packing.storable_scale(torch.rand(n, groups) + 0.01, group)[0]
    else:
        scale = torch.randint(100, 120, (n, groups), dtype=torch.uint8)
    return CodedMatrix(codes, scale, 0.02 if name == "nvfp4" else 1.0, table, name, group)


@pytest.mark.parametrize(("name", "group"), [(n, g) for n, f in FORMATS.items() for g in f.group_sizes])
def test_a_packed_matrix_decodes_to_the_same_floats(name: str, group: int) -> None:
    given = matrix(name, group)
    p = pack_coded(given)
    decoded = unpack_coded(
        p.weight, p.scale, p.table, p.n, p.k, name, group, p.scale_multiplier, torch.float64
    )
    assert torch.equal(decoded, given.dequantized(torch.float64))
    expected = given.codes.double()
    for row, column in ((0, 0), (20, 99), (7, 64)):
        form = FORMATS[name]
        value = form.values(given.table)[int(given.codes[row, column])]
        scale = scale_values(given.scale, form, torch.float64)[row, column // group if group else 0]
        expected[row, column] = value * scale * given.multiplier
        assert float(decoded[row, column]) == pytest.approx(float(expected[row, column]), rel=1e-12)


def replaced(given: CodedMatrix, **changes: object) -> CodedMatrix:
    return CodedMatrix(**{**vars(given), **changes})  # type: ignore[arg-type]  # fields by name


def test_what_cannot_be_packed_is_refused() -> None:
    infinite = torch.full((2, 32), 0x7C, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"NaN or infinity[\s\S]*64 of 64 codes"):
        pack_coded(CodedMatrix(infinite, torch.ones(2, 1), 1.0, None, "e5m2", 0))
    nan_scale = replaced(matrix("mxfp4", 32), scale=torch.full((21, 4), 255, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"84 of 84 scales"):
        pack_coded(nan_scale)
    with pytest.raises(InputError, match=r"no groups of 64[\s\S]*expected: 32"):
        pack_coded(replaced(matrix("mxfp4", 32), group_size=64))
    with pytest.raises(InputError, match=r"do not fit mxfp4[\s\S]*0\.\.15"):
        pack_coded(replaced(matrix("mxfp4", 32), codes=torch.full((21, 100), 16, dtype=torch.uint8)))
    with pytest.raises(InputError, match="table4 needs a table"):
        pack_coded(replaced(matrix("table4", 32), table=None))
    with pytest.raises(InputError, match="not representable"):
        pack_coded(replaced(matrix("nf4", 64), scale=torch.rand(21, 2) + 1 / 3))
    with pytest.raises(InputError, match=r"Unknown weight format[\s\S]*nf4 \| table4"):
        torch.ops.isofold.dequantize_coded(
            torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 1), torch.tensor(1.0), None, "fp3", 0
        )


def test_linear_coded_is_the_linear_on_the_decoded_weight() -> None:
    given = matrix("nvfp4", 16)
    p = pack_coded(given)
    x: Tensor = torch.randn(3, 100, dtype=torch.float64)
    got = torch.ops.isofold.linear_coded(
        x, p.weight, p.scale, None, None, None, 21, 100, "nvfp4", 16, p.scale_multiplier, "relu", False
    )
    expected = torch.relu(x @ given.dequantized(torch.float64).T)
    assert torch.allclose(got, expected, rtol=1e-12)
