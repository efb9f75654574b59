"""QuantizeActivation, PackedLinear and PackedLinearFloat against the dialect's references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.dialect.packing import (
    PackedLinear,
    alignment,
    code_range,
    interleave_gated,
    pack_linear,
    storable_scale,
    zero_steps,
)

Run = Callable[..., list[Tensor]]
Check = Callable[..., None]
WEIGHTS = ("weight", "scale", "zero", "wsum", "bias")
FORMATS = [(b, g) for b in (2, 3, 4, 8) for g in (0, 32, 128) if g or b >= 4]


def random_codes(
    n: int, k: int, bits: int, group_size: int, asymmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    low, high = code_range(bits, not asymmetric)
    groups = -(-k // group_size) if group_size else 1
    codes = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
    scale, _ = storable_scale(torch.rand(n, groups) * 0.02 + 0.001, group_size)
    zero = torch.randint(-5, 6, (n, groups), dtype=torch.int8) if asymmetric else None
    if zero is not None and zero_steps(bits) > 1:
        zero = torch.randint(-80, 81, (n, groups)) / zero_steps(bits)
    return codes, scale, zero


def random_packed(n: int, k: int, bits: int, group_size: int, asymmetric: bool, gated: bool) -> PackedLinear:
    if not gated:
        return pack_linear(*random_codes(n, k, bits, group_size, asymmetric), bits, group_size)
    halves = [random_codes(n, k, bits, group_size, asymmetric) for _ in range(2)]
    codes, scale = (interleave_gated(halves[0][i], halves[1][i]) for i in range(2))
    gate_zero, up_zero = halves[0][2], halves[1][2]
    zero = None if gate_zero is None or up_zero is None else interleave_gated(gate_zero, up_zero)
    scale, _ = storable_scale(scale, group_size)
    return pack_linear(codes, scale, zero, bits, group_size)


def linear_arguments(
    shape: tuple[int, ...],
    n: int,
    k: int,
    bits: int = 4,
    group_size: int = 32,
    *,
    asymmetric: bool = False,
    activation: str = "none",
    gated: bool = False,
    bias: bool = True,
    residual: bool = False,
    static: bool = False,
    quantized: bool = True,
) -> list[object]:
    packed = random_packed(n, k, bits, group_size, asymmetric, gated)
    x = torch.randn(*shape, k)
    width = 2 * -(-n // 16) * 16 if gated else n
    tail = (n, k, bits, group_size, packed.scale_multiplier, activation, gated)
    b = torch.randn(width) if bias else None
    r = torch.randn(*shape, n) if residual else None
    if not quantized:
        return [x, packed.weight, packed.scale, packed.zero, b, r, *tail]
    pair = torch.tensor([0.02, 117.0]) if static else None
    u, params = OPERATORS["quantize_activation"].reference(x, pair, alignment(group_size))
    return [u, params, packed.weight, packed.scale, packed.zero, packed.wsum, b, r, *tail]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("shape", "align"), [((3, 5, 20), 32), ((7, 64), 32), ((1, 1000), 128), ((0, 33), 64)]
)
def test_quantize_activation_is_the_reference_bit_for_bit(
    run_operator: Run, shape: tuple[int, ...], align: int, static: bool
) -> None:
    x = torch.randn(shape) * 3
    if x.numel():
        x[0] = 0.0
    arguments = [x, torch.tensor([0.03, 100.0]) if static else None, align]
    u, params = run_operator("quantize_activation", arguments)
    expected_u, expected_params = OPERATORS["quantize_activation"].reference(*arguments)
    assert torch.equal(u, expected_u)
    assert torch.equal(params, expected_params)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 21])
def test_packed_linear_formats(check: Check, bits: int, group_size: int, asymmetric: bool, rows: int) -> None:
    arguments = linear_arguments((rows,), 45, 150, bits, group_size, asymmetric=asymmetric)
    check("linear_packed", arguments, constants=WEIGHTS)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_linear_epilogues(check: Check, activation: str, gated: bool) -> None:
    options = {"activation": activation, "gated": gated, "residual": True}
    check("linear_packed", linear_arguments((2, 9), 40, 64, 8, 0, **options), constants=WEIGHTS)  # type: ignore[arg-type] # one dict
    for bits in (4, 3, 2):
        check("linear_packed", linear_arguments((1, 2), 33, 96, bits, 32, **options), constants=WEIGHTS)  # type: ignore[arg-type] # one dict


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 128, 200])
def test_packed_linear_larger_with_threads(check: Check, rows: int, threads: int) -> None:
    for bits, asymmetric in ((4, False), (3, True), (2, True)):
        arguments = linear_arguments((rows,), 300, 1100, bits, 32, asymmetric=asymmetric)
        check("linear_packed", arguments, constants=WEIGHTS, threads=threads)
    arguments = linear_arguments((rows,), 300, 1100, 8, 0, asymmetric=True)
    check("linear_packed", arguments, constants=WEIGHTS, threads=threads)


def test_packed_linear_static_pair_and_weights_that_are_not_constant(check: Check) -> None:
    arguments = linear_arguments((4,), 48, 70, 8, 0, static=True, bias=False)
    check("linear_packed", arguments)
    check("linear_packed", arguments, constants=("weight", "wsum"))


def test_packed_linear_of_no_rows(run_operator: Run) -> None:
    arguments = linear_arguments((0, 3), 48, 64)
    assert run_operator("linear_packed", arguments, constants=WEIGHTS)[0].shape == (0, 3, 48)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 17])
def test_packed_linear_float(check: Check, bits: int, group_size: int, asymmetric: bool, rows: int) -> None:
    arguments = linear_arguments((rows,), 45, 150, bits, group_size, asymmetric=asymmetric, quantized=False)
    check("linear_packed_float", arguments, constants=WEIGHTS)


def test_packed_linear_float_gated_with_residual(check: Check) -> None:
    arguments = linear_arguments(
        (5, 8), 40, 96, activation="silu", gated=True, residual=True, quantized=False
    )
    check("linear_packed_float", arguments, constants=WEIGHTS, threads=2)
