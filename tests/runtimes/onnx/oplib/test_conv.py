"""PackedConv against the dialect's reference: one and two dimensions, stride, padding, dilation, ragged sizes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect.packing import pack_linear

Check = Callable[..., None]
CONSTANTS = ("weight", "scale", "wsum", "bias")


def arguments(
    x: Tensor, n: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    *, static: bool = False, bias: bool = True, activation: str = "none",
) -> list[object]:  # fmt: skip
    k = x.shape[1] * prod(kernel)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    packed = pack_linear(codes, torch.rand(n, 1) * 0.01 + 0.001, None, 8, 0)
    pair = torch.tensor([0.025, 130.0]) if static else None
    b = torch.randn(n) if bias else None
    return [
        x,
        pair,
        packed.weight,
        packed.scale,
        packed.wsum,
        b,
        kernel,
        stride,
        padding,
        dilation,
        n,
        activation,
    ]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("shape", "n", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 3, 50), 20, [5], [1], [2], [1]),
        ((1, 17, 40), 33, [3], [2], [0], [3]),
        ((3, 8, 7), 16, [1], [1], [0], [1]),
        ((2, 3, 16, 16), 40, [4, 4], [4, 4], [0, 0], [1, 1]),
        ((1, 5, 13, 11), 18, [3, 3], [1, 2], [1, 0], [1, 1]),
        ((2, 4, 9, 20), 7, [2, 3], [2, 1], [0, 3], [2, 1]),
        ((1, 64, 14, 14), 64, [3, 3], [1, 1], [1, 1], [1, 1]),
        ((0, 3, 8, 8), 4, [3, 3], [1, 1], [1, 1], [1, 1]),
    ],
)
def test_conv(
    check: Check, shape: tuple[int, ...], n: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], static: bool,
) -> None:  # fmt: skip
    call = arguments(torch.randn(shape), n, kernel, stride, padding, dilation, static=static)
    check("conv_packed", call, constants=CONSTANTS, threads=2)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation_without_bias(check: Check, activation: str) -> None:
    call = arguments(torch.randn(1, 4, 30), 20, [3], [1], [1], [1], bias=False, activation=activation)
    check("conv_packed", call, constants=CONSTANTS)


def test_samples_have_their_own_scale(check: Check) -> None:
    x = torch.randn(3, 6, 40000) * torch.tensor([1.0, 100.0, 0.01]).reshape(3, 1, 1)
    call = arguments(x, 5, [3], [500], [1], [1], bias=False)
    check("conv_packed", call, constants=CONSTANTS, threads=2)


def test_a_kernel_larger_than_the_padded_input_is_an_error(run_operator: Callable[..., list[Tensor]]) -> None:
    call = arguments(torch.randn(1, 2, 4), 3, [7], [1], [1], [1])
    with pytest.raises(Exception, match=r"smaller than the dilated kernel \(7\)"):
        run_operator("conv_packed", call, constants=CONSTANTS, shapes={"x": [1, 2, "T"]})
