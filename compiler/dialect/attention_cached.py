"""`isofold::attention_cached`: attention that reads keys and values as packed codes (`cache_packing`).

    q . k_t = s_t ( sum_d q_d u_td  -  z_t sum_d q_d ),      sum_t p_t v_t = sum_t (p_t s_t) u_t  -  sum_t p_t s_t z_t

With groups inside a head each has its own pair: scores are sums over groups, and values are made group by group. Equal
over the reals to `attention` on `dequantize_cache` of both; softmax, mask, cap and causality as there. Codes lie
head by head, `[B, H, T, ...]`, so that a head's tokens are one stream; T grows by joining new tokens at its end.
"""

from __future__ import annotations

from torch import Tensor

from .attention import attention
from .dequantize_cache import dequantize_cache
from .operator import Cost, operator, tensor_bytes


def _cost(
    q: Tensor, k: Tensor, k_params: Tensor, v: Tensor, v_params: Tensor, mask: Tensor | None, heads: int,
    kv_heads: int, depth: int, *rest: object,
) -> Cost:  # fmt: skip
    batch, queries, keys, width = int(q.shape[0]), int(q.shape[1]), int(k.shape[2]), int(str(rest[0]))
    out = 4 * batch * queries * heads * width
    read = tensor_bytes(q, k, k_params, v, v_params, mask)
    return Cost(0, read + out, 2 * batch * heads * queries * keys * (depth + width))


@operator(
    onnx_name="CachedAttention",
    schema=(
        "(Tensor q, Tensor k, Tensor k_params, Tensor v, Tensor v_params, Tensor? mask, int heads, int kv_heads, "
        "int depth, int value_depth, int bits, int q_start, float scale, bool causal, float softcap, "
        "int group=0) -> Tensor"
    ),
    shape=lambda q, k, kp, v, vp, mask, heads, kv_heads, depth, value_depth, *rest: q.new_empty(
        [q.shape[0], q.shape[1], heads, value_depth]
    ),
    cost=_cost,
)
def attention_cached(
    q: Tensor,
    k: Tensor,
    k_params: Tensor,
    v: Tensor,
    v_params: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    depth: int,
    value_depth: int,
    bits: int,
    q_start: int,
    scale: float,
    causal: bool,
    softcap: float,
    group: int = 0,
) -> Tensor:
    """q `[B, S, Hq', depth]`, k and v uint8 `[B, kv_heads, T, ...]` with pairs `[B, kv_heads, T, 2 G]`, mask as in
    `attention` → `[B, S, heads, value_depth]`. group: dimensions that share a pair, 0: the head."""
    keys = dequantize_cache.reference(k, k_params, depth, bits, group).transpose(1, 2)
    values = dequantize_cache.reference(v, v_params, value_depth, bits, group).transpose(1, 2)
    result: Tensor = attention.reference(
        q, keys, values, mask, heads, kv_heads, q_start, 0, 0, scale, causal, softcap
    )
    return result
