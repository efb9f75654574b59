"""`isofold::conv_packed`: a convolution with int8 weights on activations quantized per sample.

The input is rounded to 8 bits (per sample, or with a static pair), padding inserts the zero point, and
the integer sums are those of a packed linear over the unfolded input:

    y[o, p] = s ( scale[o] sum_i u[p, i] w[o, i] - z wsum[o] ) + bias[o],   i over (channel, kernel position)

Equal over the reals to the convolution of the rounded input with the dequantized weight. groups = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .activation import activate
from .operator import Cost, operator, tensor_bytes
from .packing import unpack_weight
from .quantize_dequantize import quantize_dequantize

Sizes = list[int]


def _shape(x: Tensor, params: Tensor | None, *rest: object) -> Tensor:
    kernel, stride, padding, dilation, n = rest[4:9]
    assert isinstance(n, int)
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)  # type: ignore[call-overload] # rest is untyped
    return x.new_empty([x.shape[0], n, *((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes)])


def _cost(
    x: Tensor,
    params: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    wsum: Tensor,
    bias: Tensor | None,
    *rest: object,
) -> Cost:
    out = int(_shape(x, params, weight, scale, wsum, bias, *rest).numel())
    kernel = rest[0]
    assert isinstance(kernel, (list, tuple))
    return Cost(
        tensor_bytes(weight, scale, wsum, bias),
        tensor_bytes(x) + 4 * out,
        2 * out * int(x.shape[1]) * math.prod(kernel),
    )


@operator(
    onnx_name="PackedConv",
    schema=(
        "(Tensor x, Tensor? params, Tensor weight, Tensor scale, Tensor wsum, Tensor? bias, int[] kernel, "
        "int[] stride, int[] padding, int[] dilation, int n, str activation) -> Tensor"
    ),
    shape=_shape,
    cost=_cost,
    packed_argument="weight",
)
def conv_packed(
    x: Tensor,
    params: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    wsum: Tensor,
    bias: Tensor | None,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    n: int,
    activation: str,
) -> Tensor:
    """x `[B, C, *spatial]` (one or two spatial dimensions) → `[B, n, *spatial']`."""
    k = x.shape[1] * math.prod(kernel)
    matrix = unpack_weight(weight, scale, None, n, k, 8, 0, 1.0, x.dtype)
    rounded = quantize_dequantize.reference(x, params, "sample")
    convolve = torch.conv1d if len(kernel) == 1 else torch.conv2d
    y = convolve(rounded, matrix.reshape(n, x.shape[1], *kernel), bias, stride, padding, dilation)
    return activate(y, activation)
