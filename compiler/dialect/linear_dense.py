"""`isofold::linear_dense`: a float linear whose weights are stored in panels.

    y = F.linear(x, w) + bias, then the epilogue of `linear_packed`;  w is stored as in `dense_packing`

The same numbers as `aten.linear`: only the order of the weights in memory differs, and with it that of the sums.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .dense_packing import unpack_dense
from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes


def _cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, n: int, k: int, *rest: object
) -> Cost:
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(weight, bias), tensor_bytes(x, residual) + 4 * rows * n, 2 * rows * int(weight.numel())
    )


@operator(
    onnx_name="DenseLinear",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int n, int k, str activation, bool gated) "
        "-> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([*x.shape[:-1], rest[3]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """x float `[..., k]`; weight as in `dense_packing`, `[ceil(rows / 32), k, 32]` → `[..., n]` in the dtype of x."""
    matrix = unpack_dense(weight, packed_rows(n, gated)).to(x.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
