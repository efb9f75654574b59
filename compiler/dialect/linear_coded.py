"""`isofold::linear_coded`: a linear with weights as codes of a table or of small floats, and float activations.

    y = F.linear(x, value[code] scale) + bias, then the epilogue of `linear_packed`.

Equal over the reals to the linear on the decoded weight. Formats: `element_formats.py`, layouts: `packing_coded.py`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing_coded import unpack_coded


def _cost(
    x: Tensor, weight: Tensor, scale: Tensor, table: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(weight, scale, table, bias),
        tensor_bytes(x, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[4])) * k,
    )


@operator(
    onnx_name="CodedLinear",
    schema=(
        "(Tensor x, Tensor weight, Tensor scale, Tensor? table, Tensor? bias, Tensor? residual, int n, int k, "
        "str format, int group_size, float scale_multiplier, str activation, bool gated) -> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([*x.shape[:-1], rest[5]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_coded(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    format: str,
    group_size: int,
    scale_multiplier: float,
    activation: str,
    gated: bool,
) -> Tensor:
    """x float `[..., k]`, packed weight, table float32 `[16]` of table4 → `[..., n]` in the dtype of x."""
    rows = packed_rows(n, gated)
    matrix = unpack_coded(weight, scale, table, rows, k, format, group_size, scale_multiplier, x.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
