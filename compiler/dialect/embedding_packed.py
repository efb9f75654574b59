"""`isofold::embedding_packed`: rows of a quantized table, `scale (w - zero)` of the asked ids only."""

from __future__ import annotations

from torch import Tensor

from .operator import Cost, operator, tensor_bytes
from .packing import dequantize, unpack_embedding_codes


def _cost(
    ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, dim: int, bits: int, group_size: int
) -> Cost:
    count = int(ids.numel())
    return Cost(
        tensor_bytes(weight, scale, zero),
        tensor_bytes(ids) + count * dim * (bits // 4 + 8) // 2,
        2 * count * dim,
    )


@operator(
    onnx_name="PackedEmbedding",
    schema="(Tensor ids, Tensor weight, Tensor scale, Tensor? zero, int dim, int bits, int group_size) -> Tensor",
    shape=lambda ids, weight, scale, zero, dim, *rest: scale.new_empty([*ids.shape, dim]),
    cost=_cost,
    packed_argument="weight",
)
def embedding_packed(
    ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, dim: int, bits: int, group_size: int
) -> Tensor:
    """ids int64 or int32 `[...]` in -V..V-1, weight int8 `[V, D]` or uint8 `[V, ceil(D/2)]` → `[..., dim]`."""
    flat = ids.reshape(-1)
    codes = unpack_embedding_codes(weight[flat], dim, bits)
    rows = dequantize(codes, scale[flat], None if zero is None else zero[flat], group_size)
    return rows.reshape([*ids.shape, dim])
