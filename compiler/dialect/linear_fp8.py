"""`isofold::linear_fp8`: a linear whose activations and weights are FP8 codes.

    y[n] = s ( sum_k value[u_k] value[code[n, k]] scale[n, g(k)] ) + bias[n], then the epilogue of `linear_packed`

which is `F.linear(s value[u], value[code] scale) + bias` with the token's scale in front of the sum: equal over the
reals, and what tensor cores multiply. u are E4M3 codes (`quantization_fp8.py`); weights are E4M3 or E5M2, packed and
scaled as in `linear_coded`.

Example: u = 0x38 0x40 (1, 2), s = 0.5, code = 0x38 0xC0 (1, -2), scale 3: y = 0.5 (1 - 4) 3 = -4.5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .linear_packed import epilogue, packed_rows
from .operator import Cost, operator, tensor_bytes
from .packing_coded import unpack_coded
from .quantization_fp8 import decode

WEIGHT_FORMATS = ("e4m3", "e5m2", "mxfp8_e4m3", "mxfp8_e5m2")
"""Formats of weights that meet FP8 activations (`element_formats.FORMATS`)."""


def _check(format: str) -> None:
    if format not in WEIGHT_FORMATS:
        raise InputError(
            "FP8 activations meet FP8 weights only", expected=" | ".join(WEIGHT_FORMATS), got=repr(format)
        )


def _shape(u: Tensor, params: Tensor, *rest: Any) -> Tensor:
    _check(rest[6])
    return params.new_empty([*u.shape[:-1], rest[4]])


def _cost(
    u: Tensor, params: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    n: int, k: int, *rest: object,
) -> Cost:  # fmt: skip
    rows = int(u.numel()) // int(u.shape[-1]) if u.numel() else 0
    return Cost(
        tensor_bytes(weight, scale, bias),
        tensor_bytes(u, params, residual) + 4 * rows * n,
        2 * rows * packed_rows(n, bool(rest[4])) * k,
    )


@operator(
    onnx_name="Fp8Linear",
    schema=(
        "(Tensor u, Tensor params, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, int n, int k, "
        "str format, int group_size, float scale_multiplier, str activation, bool gated) -> Tensor"
    ),
    shape=_shape,
    cost=_cost,
    packed_argument="weight",
)
def linear_fp8(
    u: Tensor,
    params: Tensor,
    weight: Tensor,
    scale: Tensor,
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
    """u uint8 `[..., Kp]`, params: s `[..., 1]` or `[1]`, packed weight → `[..., n]` in the dtype of params."""
    _check(format)
    rows = packed_rows(n, gated)
    matrix = unpack_coded(weight, scale, None, rows, k, format, group_size, scale_multiplier, params.dtype)
    x = params * decode(u[..., :k], params.dtype)
    return epilogue(F.linear(x, matrix, bias), residual, n, activation, gated)
