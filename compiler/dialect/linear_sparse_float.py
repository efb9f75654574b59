"""`isofold::linear_sparse_float`: a float linear whose weights are mostly zero.

    y = F.linear(x, w) + bias, then the epilogue of `linear_packed`;  w is stored as in `sparse_packing`

The same numbers as the dense linear: what is left out are products with zero. Values are float32 or bfloat16.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .sparse_packing import unpack_sparse


def _cost(
    x: Tensor, places: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None,
    n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(places, values, offsets, bias),
        tensor_bytes(x, residual) + 4 * rows * n,
        2 * rows * int(values.numel()),
    )


@operator(
    onnx_name="SparseLinearFloat",
    schema=(
        "(Tensor x, Tensor places, Tensor values, Tensor offsets, Tensor? bias, Tensor? residual, int n, int k, "
        "str layout, str activation, bool gated) -> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([*x.shape[:-1], rest[5]]),
    cost=_cost,
    packed_argument="values",
)
def linear_sparse_float(
    x: Tensor,
    places: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    layout: str,
    activation: str,
    gated: bool,
) -> Tensor:
    """x float `[..., k]`; places, values and offsets as in `sparse_packing` → `[..., n]` in the dtype of x."""
    matrix = unpack_sparse(layout, places, values, offsets, packed_rows(n, gated), k).to(x.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
