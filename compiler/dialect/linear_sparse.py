"""`isofold::linear_sparse`: a linear whose activations are integers and whose int8 weights are mostly zero.

    y[n] = s scale[n] ( sum_k u_k w[n,k] )  -  s z wsum[n]  +  bias[n],  then the epilogue of `linear_packed`

The arithmetic of `linear_packed` with one symmetric scale a row (so that a zero weight is the code 0); only how the
codes are stored differs (`sparse_packing`), and zeros cost nothing. Gated rows are interleaved as in `linear_packed`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing import unpack_groups
from .sparse_packing import unpack_sparse


def _cost(
    u: Tensor, params: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, scale: Tensor, wsum: Tensor,
    bias: Tensor | None, residual: Tensor | None, n: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(u.numel()) // int(u.shape[-1]) if u.numel() else 0
    return Cost(
        tensor_bytes(mask, values, offsets, scale, wsum, bias),
        tensor_bytes(u, params, residual) + 4 * rows * n,
        2 * rows * int(values.numel()),
    )


@operator(
    onnx_name="SparseLinear",
    schema=(
        "(Tensor u, Tensor params, Tensor mask, Tensor values, Tensor offsets, Tensor scale, Tensor wsum, "
        "Tensor? bias, Tensor? residual, int n, int k, str activation, bool gated) -> Tensor"
    ),
    shape=lambda u, params, *rest: params.new_empty([*u.shape[:-1], rest[7]]),
    cost=_cost,
    packed_argument="values",
)
def linear_sparse(
    u: Tensor,
    params: Tensor,
    mask: Tensor,
    values: Tensor,
    offsets: Tensor,
    scale: Tensor,
    wsum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """u uint8 `[..., ceil(k, 32)]` (or wider), params `[..., 2]` or `[2]` → `[..., n]` in the dtype of params.

    mask, values int8 and offsets as in `sparse_packing`; scale float32 `[Np/16, 1, 16]` and wsum `[Np]` as in
    `linear_packed`.
    """
    rows = packed_rows(n, gated)
    codes = unpack_sparse(mask, values, rows, k).to(params.dtype)
    matrix = codes * unpack_groups(scale, rows, k, 0).to(params.dtype)
    x = params[..., :1] * (u[..., :k].to(params.dtype) - params[..., 1:])
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
