"""`isofold::linear_sparse`: a linear whose activations are integers and whose weights, codes too, are mostly zero.

    y[n] = s sum_g scale[n,g] ( sum_{k in g} u_k w[n,k] )  -  s z wsum[n]  +  bias[n],  then `linear_packed`'s epilogue

The arithmetic of `linear_packed` with symmetric scales (so that a zero weight is the code 0); only how the codes are
stored differs (`sparse_packing`), and zeros cost nothing. Codes have 8 bits and a scale a row, or, as a bitmask, 4 bits
and scales as dense int4 has them. Gated rows are interleaved as in `linear_packed`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing import dequantize, unpack_groups
from .sparse_packing import unpack_sparse


def _cost(
    u: Tensor, params: Tensor, places: Tensor, values: Tensor, offsets: Tensor, scale: Tensor, wsum: Tensor,
    bias: Tensor | None, residual: Tensor | None, n: int, k: int, layout: str, bits: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(u.numel()) // int(u.shape[-1]) if u.numel() else 0
    return Cost(
        tensor_bytes(places, values, offsets, scale, wsum, bias),
        tensor_bytes(u, params, residual) + 4 * rows * n,
        2 * rows * int(values.numel()) * 8 // bits,
    )


@operator(
    onnx_name="SparseLinear",
    schema=(
        "(Tensor u, Tensor params, Tensor places, Tensor values, Tensor offsets, Tensor scale, Tensor wsum, "
        "Tensor? bias, Tensor? residual, int n, int k, str layout, int bits, int group_size, "
        "float scale_multiplier, str activation, bool gated) -> Tensor"
    ),
    shape=lambda u, params, *rest: params.new_empty([*u.shape[:-1], rest[7]]),
    cost=_cost,
    packed_argument="values",
)
def linear_sparse(
    u: Tensor,
    params: Tensor,
    places: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: Tensor,
    wsum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    layout: str,
    bits: int,
    group_size: int,
    scale_multiplier: float,
    activation: str,
    gated: bool,
) -> Tensor:
    """u uint8 `[..., ceil(k, 32)]` (or wider), params `[..., 2]` or `[2]` → `[..., n]` in the dtype of params.

    places, values and offsets as in `sparse_packing`; scale `[Np/16, G, 16]` and wsum `[Np]` as in `linear_packed`.
    """
    rows = packed_rows(n, gated)
    codes = unpack_sparse(layout, places, values, offsets, rows, k, bits).to(params.dtype)
    factors = unpack_groups(scale, rows, k, group_size).to(params.dtype) * scale_multiplier
    matrix = dequantize(codes, factors, None, group_size)
    x = params[..., :1] * (u[..., :k].to(params.dtype) - params[..., 1:])
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
