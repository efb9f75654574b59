"""`isofold::dequantize_cache`: keys or values from packed codes, `s (u - z)` (inverse of `quantize_cache` up to
rounding).

It stands in front of an attention until `fuse_attention` lets the attention read the codes themselves.
"""

from __future__ import annotations

from torch import Tensor

from .cache_packing import check_group, cut, pair_count, unpack_cache_codes
from .operator import Cost, operator, tensor_bytes


@operator(
    onnx_name="DequantizeCache",
    schema="(Tensor codes, Tensor params, int depth, int bits, int group=0) -> Tensor",
    shape=lambda codes, params, depth, bits, group=0: params.new_empty([*codes.shape[:-1], depth]),
    cost=lambda codes, params, depth, bits, group=0: Cost(
        0,
        tensor_bytes(codes, params) + 4 * int(params.numel()) // (2 * pair_count(depth, group)) * depth,
        int(params.numel()) // pair_count(depth, group) * depth,
    ),
)
def dequantize_cache(codes: Tensor, params: Tensor, depth: int, bits: int, group: int = 0) -> Tensor:
    """codes uint8 and params `[..., 2]` or `[..., 2 G]` as of `quantize_cache` → float `[..., depth]`."""
    check_group(group, depth)
    count = pair_count(depth, group)
    heads, pairs = cut(codes, count), cut(params, count)
    u = unpack_cache_codes(heads, depth // count, bits).to(params.dtype)
    result: Tensor = (pairs[..., :1] * (u - pairs[..., 1:])).flatten(-2)
    return result
