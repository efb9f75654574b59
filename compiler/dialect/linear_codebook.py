"""`isofold::linear_codebook`: a linear with weights as sums of codebook vectors (AQLM), and float activations.

    y = F.linear(x, scale sum_m codebooks[m, code_m]) + bias, then the epilogue of `linear_packed`.

Equal over the reals to the linear on the decoded weight. Layout: `packing_codebook.py`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing_codebook import unpack_codebook


def _cost(
    x: Tensor, weight: Tensor, codebooks: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(x.numel()) // k
    return Cost(
        tensor_bytes(weight, codebooks, scale, bias),
        tensor_bytes(x, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[2])) * k,
    )


@operator(
    onnx_name="CodebookLinear",
    schema=(
        "(Tensor x, Tensor weight, Tensor codebooks, Tensor scale, Tensor? bias, Tensor? residual, int n, int k, "
        "str format, str activation, bool gated) -> Tensor"
    ),
    shape=lambda x, *rest: x.new_empty([*x.shape[:-1], rest[5]]),
    cost=_cost,
    packed_argument="weight",
)
def linear_codebook(
    x: Tensor,
    weight: Tensor,
    codebooks: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    format: str,
    activation: str,
    gated: bool,
) -> Tensor:
    """x float `[..., k]`, packed codes, codebooks `[M, 2^b, 8]`, scale → `[..., n]` as x. format: the layout, "2x8"."""
    matrix = unpack_codebook(weight, codebooks, scale, packed_rows(n, gated), k, x.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
