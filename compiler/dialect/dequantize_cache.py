"""`isofold::dequantize_cache`: keys or values from packed codes, `s (u - z)` (inverse of `quantize_cache` up to
rounding).

It stands in front of an attention until `fuse_attention` lets the attention read the codes themselves.
"""

from __future__ import annotations

from torch import Tensor

from .cache_packing import unpack_cache_codes
from .operator import Cost, operator, tensor_bytes


@operator(
    onnx_name="DequantizeCache",
    schema="(Tensor codes, Tensor params, int depth, int bits) -> Tensor",
    shape=lambda codes, params, depth, bits: params.new_empty([*codes.shape[:-1], depth]),
    cost=lambda codes, params, depth, bits: Cost(
        0, tensor_bytes(codes, params) + 4 * int(params.numel()) // 2 * depth, int(params.numel()) * depth
    ),
)
def dequantize_cache(codes: Tensor, params: Tensor, depth: int, bits: int) -> Tensor:
    """codes uint8 and params `[..., 2]` as of `quantize_cache` → float `[..., depth]`."""
    u = unpack_cache_codes(codes, depth, bits).to(params.dtype)
    result: Tensor = params[..., :1] * (u - params[..., 1:])
    return result
