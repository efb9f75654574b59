"""`isofold::linear_packed`: a linear whose activations and weights are integers.

    y[n] = s ( sum_g scale[n,g] ( sum_{k in g} u_k w[n,k] - zero[n,g] sum_{k in g} u_k ) - z wsum[n] ) + bias[n]

which is `F.linear(s (u - z), scale (w - zero)) + bias` multiplied out, so it equals the
quantize_dequantize / dequantize_weight form over the reals; only the order of roundings differs.
`activation` and then `+ residual` follow as an epilogue. Gated: see docs/dialect.md.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .activation import activate
from .operator import Cost, operator, tensor_bytes
from .packing import LANES, ceil_to, split_gated, unpack_weight


def packed_rows(n: int, gated: bool) -> int:
    """Rows of the packed matrix that decode to `n` output features."""
    return 2 * ceil_to(n, LANES) if gated else n


def epilogue(y: Tensor, residual: Tensor | None, n: int, activation: str, gated: bool) -> Tensor:
    """Activation (or gating of the interleaved halves), then the residual."""
    if gated:
        gate, up = split_gated(y.movedim(-1, 0), n)
        y = (activate(gate, activation) * up).movedim(0, -1)
    else:
        y = activate(y, activation)
    return y if residual is None else y + residual


def _cost(
    u: Tensor, params: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, wsum: Tensor,
    bias: Tensor | None, residual: Tensor | None, n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(u.numel()) // int(u.shape[-1]) if u.numel() else 0
    return Cost(
        tensor_bytes(weight, scale, zero, wsum, bias),
        tensor_bytes(u, params, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[4])) * k,
    )


@operator(
    onnx_name="PackedLinear",
    schema=(
        "(Tensor u, Tensor params, Tensor weight, Tensor scale, Tensor? zero, Tensor wsum, Tensor? bias, "
        "Tensor? residual, int n, int k, int bits, int group_size, float scale_multiplier, str activation, "
        "bool gated) -> Tensor"
    ),
    shape=lambda u, params, *rest: params.new_empty([*u.shape[:-1], rest[6]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_packed(
    u: Tensor,
    params: Tensor,
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
) -> Tensor:
    """u uint8 `[..., Kp]`, params `[..., 2]` or `[2]`, packed weight → `[..., n]` in the dtype of params."""
    rows = packed_rows(n, gated)
    matrix = unpack_weight(weight, scale, zero, rows, k, bits, group_size, scale_multiplier, params.dtype)
    x = params[..., :1] * (u[..., :k].to(params.dtype) - params[..., 1:])
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
