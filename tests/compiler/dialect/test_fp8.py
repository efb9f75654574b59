"""FP8 activations: every code and every boundary between codes, saturation, rows that are not finite, the formula of
the linear, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isofold.compiler import recipe
from isofold.compiler.dialect import OPERATORS, linear_fp8
from isofold.compiler.dialect.element_formats import FORMATS
from isofold.compiler.dialect.packing_coded import CodedMatrix, pack_coded
from isofold.compiler.dialect.quantization_fp8 import LARGEST, decode, encode
from isofold.compiler.errors import InputError

OPS: Any = torch.ops.isofold
ONE = torch.tensor([1.0])
VALUES = FORMATS["e4m3"].values()


def boundaries() -> Tensor:
    """Every positive value, every middle of two, and their neighbours in float32."""
    positive = VALUES[:0x7F].float()
    middles = (positive[:-1] + positive[1:]) / 2
    points = torch.cat([positive, middles])
    return torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1.0))])


def nearest(x: Tensor) -> Tensor:
    """Codes by search in float64: the nearest value, of two equally near the even code."""
    magnitudes = VALUES[:0x7F]
    distance = (x.abs().double()[:, None] - magnitudes).abs()
    best = distance.min(1, keepdim=True).values
    near = distance == best
    even = torch.arange(0x7F) % 2 == 0
    code = torch.where((near & even).any(1), (near & even).int().argmax(1), near.int().argmax(1))
    return (code + 128 * (x < 0)).to(torch.uint8)


def test_codes_are_the_nearest_and_ties_are_even() -> None:
    x = boundaries()
    x = torch.cat([x, -x[x > 0]])
    assert torch.equal(encode(x, ONE), nearest(x))


def test_every_code_stands_for_itself() -> None:
    codes = torch.arange(256).to(torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    again = encode(decode(finite, torch.float32), ONE)
    assert torch.equal(again, torch.where(finite == 0x80, 0, finite))  # zero has one code
    assert torch.equal(decode(finite, torch.float64), VALUES[finite.long()])
    assert decode(codes[[0x7F, 0xFF]], torch.float32).isnan().all()


def test_the_examples_of_the_docstrings() -> None:
    u, s = OPS.quantize_activation_fp8(torch.tensor([[-448.0, 1.0, 0.5]]), None, 4)
    assert (u.tolist(), s.tolist()) == ([[0xFE, 0x38, 0x30, 0x00]], [[1.0]])
    y = OPS.quantize_dequantize_fp8(torch.tensor([[448.0, 17.0, 18.5, 0.001, 0.0009]]), None)
    assert y.tolist() == [[448.0, 16.0, 18.0, 2.0**-9, 0.0]]
    codes = torch.tensor([[0x38, 0xC0]], dtype=torch.uint8)
    stored = pack_coded(CodedMatrix(codes, torch.tensor([[3.0]]), 1.0, None, "e4m3", 0))
    u = torch.tensor([[0x38, 0x40]], dtype=torch.uint8)
    tail = (1, 2, "e4m3", 0, 1.0, "none", False)
    y = OPS.linear_fp8(u, torch.tensor([0.5]), stored.weight, stored.scale, None, None, *tail)
    assert y.tolist() == [[-4.5]]


@settings(max_examples=50, deadline=None)
@given(st.integers(-120, 120), st.integers(0, 2**31))
def test_dynamic_scales_saturate_nothing_and_err_by_a_sixteenth(exponent: int, seed: int) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    y = OPS.quantize_dequantize_fp8(x, None)
    top = x.abs().amax(-1, keepdim=True)
    if float(top.min()) / LARGEST < 2.0**-126:
        return
    assert ((y - x).abs() <= torch.maximum(x.abs() * 2.0**-4, top / LARGEST * 2.0**-10) * 1.00001).all()
    codes, scale = OPS.quantize_activation_fp8(x, None, 1)
    assert torch.equal(scale * decode(codes, torch.float32), y)


def test_static_scales_saturate() -> None:
    x = torch.tensor([[1000.0, -1000.0, torch.inf, -torch.inf, 3.0]])
    y = OPS.quantize_dequantize_fp8(x, torch.tensor([2.0]))
    assert y.tolist() == [[896.0, -896.0, 896.0, -896.0, 3.0]]


def test_a_token_that_is_not_finite_or_zero_concerns_no_other() -> None:
    x = torch.ones(5, 8)
    x[1, 3], x[2, 0], x[3], x[4] = torch.nan, torch.inf, 0.0, 1e-44
    y = OPS.quantize_dequantize_fp8(x, None)
    assert [bool(row.isfinite().all()) for row in y] == [True, False, False, True, True]
    assert torch.equal(y[0], x[0])
    assert not y[3:].any()
    codes, scale = OPS.quantize_activation_fp8(x, None, 16)
    assert scale[3:].tolist() == [[1.0], [1.0]]
    assert codes[1, 3] == codes[2, 0] == 0x7F
    assert not codes[:, 8:].any()


@pytest.mark.parametrize("params", [None, torch.tensor([0.01])], ids=["dynamic", "static"])
def test_the_gradient_is_straight_through_inside_the_range(params: Tensor | None) -> None:
    x = torch.tensor([[1.0, -2.0, 6.0, 0.1]], requires_grad=True)
    OPS.quantize_dequantize_fp8(x, params).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 1.0 if params is None else 0.0, 1.0]]


def test_the_sum_is_that_of_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    form = FORMATS["e4m3"]
    codes = torch.randint(0, 0x7F, (5, 70), generator=g).to(torch.uint8)
    scale = torch.randint(1, 9, (5, 3), generator=g) / 8
    stored = pack_coded(CodedMatrix(codes, scale, 1.0, None, "e4m3", 32))
    u, s = OPS.quantize_activation_fp8(torch.randn(4, 70, generator=g).double(), None, 32)
    tail = (5, 70, "e4m3", 32, stored.scale_multiplier, "none", False)
    y = OPS.linear_fp8(u, s, stored.weight, stored.scale, None, None, *tail)
    values, columns = form.values(), torch.arange(70) // 32
    for m in range(4):
        for n in range(5):
            terms = values[u[m, :70].long()] * values[codes[n].long()] * scale[n, columns].double()
            assert float(y[m, n]) == pytest.approx(float(s[m] * terms.sum()), rel=1e-12)


def test_other_weights_are_refused() -> None:
    given: list[Any] = [
        torch.zeros(1, 32, dtype=torch.uint8),
        ONE,
        torch.zeros(1, 4, 16, 4, dtype=torch.uint8),
    ]
    given += [torch.zeros(1, 1, 16), None, None, 1, 32, "nf4", 32, 1.0, "none", False]
    for call in (linear_fp8.reference, linear_fp8.overload):
        with pytest.raises(
            InputError, match=r"FP8 activations meet FP8 weights only[\s\S]*mxfp8_e5m2[\s\S]*'nf4'"
        ):
            call(
                *(a.to("meta") if isinstance(a, Tensor) and call is linear_fp8.overload else a for a in given)
            )


def test_the_recipe_names_the_same_formats() -> None:
    from isofold.compiler.dialect.linear_fp8 import WEIGHT_FORMATS

    assert recipe.FP8_WEIGHTS == WEIGHT_FORMATS
    assert all(FORMATS[name].bits == 8 for name in WEIGHT_FORMATS)
    assert OPERATORS["linear_fp8"].packed_argument == "weight"
