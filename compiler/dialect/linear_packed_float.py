"""`isofold::linear_packed_float`: a linear with packed weights and float activations.

    y = F.linear(x, scale (w - zero)) + bias, then the epilogue of `linear_packed`.

Equal over the reals to the linear on the dequantized weight.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing import unpack_weight


def _cost(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(weight, scale, zero, bias),
        tensor_bytes(x, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[4])) * k,
    )


@operator(
    onnx_name="PackedLinearFloat",
    schema=(
        "(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, Tensor? residual, int n, int k, "
        "int bits, int group_size, float scale_multiplier, str activation, bool gated) -> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([*x.shape[:-1], rest[5]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_packed_float(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scale_multiplier: float,
    activation: str,
    gated: bool,
) -> Tensor:
    """x float `[..., k]`, packed weight → `[..., n]` in the dtype of x."""
    rows = packed_rows(n, gated)
    matrix = unpack_weight(weight, scale, zero, rows, k, bits, group_size, scale_multiplier, x.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
