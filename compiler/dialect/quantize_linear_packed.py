"""`isofold::quantize_linear_packed`: `quantize_activation`, then the one `linear_packed` that reads its codes.

The composition itself (BITWISE equal to the two operators). The codes live no longer than the operator, so a runtime
keeps them in its own scratch memory and runs one node for two.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..hadamard_orders import check_orders
from .linear_packed import linear_packed, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing import alignment
from .quantize_activation import quantize_activation


def _shape(
    x: Tensor, params: Tensor | None, pre_shift: Tensor | None, pre_scale: Tensor | None, weight: Tensor,
    scale: Tensor, zero: Tensor | None, wsum: Tensor, bias: Tensor | None, residual: Tensor | None, n: int,
    k: int, bits: int, group_size: int, scale_multiplier: float, activation: str, gated: bool,
    input_bits: int = 8, hadamard: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    check_orders(hadamard, k)
    return x.new_empty([*x.shape[:-1], n])


def _cost(
    x: Tensor, params: Tensor | None, pre_shift: Tensor | None, pre_scale: Tensor | None, weight: Tensor,
    scale: Tensor, zero: Tensor | None, wsum: Tensor, bias: Tensor | None, residual: Tensor | None, n: int,
    k: int, bits: int, group_size: int, scale_multiplier: float, activation: str, gated: bool,
    input_bits: int = 8, hadamard: Sequence[int] = (),
) -> Cost:  # fmt: skip
    # Operations are those of the product, as in a packed convolution: the quantizer's are few beside it.
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(pre_shift, pre_scale, weight, scale, zero, wsum, bias),
        tensor_bytes(x, params, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, gated) * k,
    )


@operator(
    onnx_name="QuantizePackedLinear",
    schema=(
        "(Tensor x, Tensor? params, Tensor? pre_shift, Tensor? pre_scale, Tensor weight, Tensor scale, "
        "Tensor? zero, Tensor wsum, Tensor? bias, Tensor? residual, int n, int k, int bits, int group_size, "
        "float scale_multiplier, str activation, bool gated, int input_bits=8, int[] hadamard=[]) -> Tensor"
    ),
    shape=_shape,
    cost=_cost,
    packed_argument="weight",
)
def quantize_linear_packed(
    x: Tensor,
    params: Tensor | None,
    pre_shift: Tensor | None,
    pre_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    wsum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scale_multiplier: float,
    activation: str,
    gated: bool,
    input_bits: int = 8,
    hadamard: Sequence[int] = (),
) -> Tensor:
    """x `[..., k]` → `[..., n]`.

    params `[2]` or None, pre_shift, pre_scale, input_bits and hadamard: `quantize_activation`'s params, shift, scale,
    bits and hadamard; all else as in `linear_packed`.
    """
    u, pair = quantize_activation.reference(
        x, params, alignment(group_size), pre_shift, pre_scale, input_bits, hadamard
    )
    y: Tensor = linear_packed.reference(
        u, pair, weight, scale, zero, wsum, bias, residual,
        n, k, bits, group_size, scale_multiplier, activation, gated,
    )  # fmt: skip
    return y
