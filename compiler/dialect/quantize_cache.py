"""`isofold::quantize_cache`: keys or values to packed codes with a pair for each token and head.

    u, (s, z) = quantize_activation((x - shift) H),   codes = pack(u)         (`cache_packing`)

With groups a head is cut into G of them, each with a pair of its own (`[..., 2 G]`): what x goes through first (shift,
H) then stands in front of the operator. Per token, so new tokens are joined to old ones without touching them. A shift
of keys needs no undoing (the scores of a query move by one number), one of values goes into the bias of what reads the
attention; H on keys has its partner on the queries. BITWISE `dequantize_cache(quantize_cache(x)) =
quantize_dequantize(x, token)` without shift and H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..hadamard_orders import check_orders
from .cache_packing import ALIGN, check_group, cut, pack_cache_codes, pair_count, row_bytes
from .operator import Cost, operator, tensor_bytes
from .quantize_activation import quantize_activation


def _shape(
    x: Tensor, shift: Tensor | None, bits: int, hadamard: Sequence[int] = (), group: int = 0
) -> tuple[Tensor, Tensor]:
    check_orders(hadamard, x.shape[-1])
    _check(shift, hadamard, group, int(x.shape[-1]))
    codes = x.new_empty([*x.shape[:-1], row_bytes(x.shape[-1], bits)], dtype=torch.uint8)
    return codes, x.new_empty([*x.shape[:-1], 2 * pair_count(int(x.shape[-1]), group)])


def _check(shift: Tensor | None, hadamard: Sequence[int], group: int, depth: int) -> None:
    check_group(group, depth)
    if group and (shift is not None or len(hadamard)):
        raise InputError(
            "A quantizer of groups inside a head takes no shift and no Hadamard transform",
            expected="them as operators of their own in front of it",
            got=f"group {group}, hadamard {list(hadamard)}{'' if shift is None else ', a shift'}",
        )


@operator(
    onnx_name="QuantizeCache",
    schema="(Tensor x, Tensor? shift, int bits, int[] hadamard=[], int group=0) -> (Tensor codes, Tensor params)",
    shape=_shape,
    cost=lambda x, shift, bits, hadamard=(), group=0: Cost(
        0, tensor_bytes(x) + int(x.numel()) * bits // 8, 4 * int(x.numel())
    ),
)
def quantize_cache(
    x: Tensor, shift: Tensor | None, bits: int, hadamard: Sequence[int] = (), group: int = 0
) -> tuple[Tensor, Tensor]:
    """x float `[..., D]` → codes uint8 `[..., Dp bits / 8]` and params `[..., 2]` or `[..., 2 G]` in the dtype of x."""
    _check(shift, hadamard, group, x.shape[-1])
    heads = cut(x, pair_count(x.shape[-1], group))
    u, params = quantize_activation.reference(heads, None, ALIGN, shift, None, bits, hadamard)
    return pack_cache_codes(u, bits).flatten(-2), params.flatten(-2)
