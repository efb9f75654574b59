"""`isofold::attention`: scores, scale, logit cap, mask, softmax and values in one operator, heads last-but-one.

    y[b, s, h] = softmax_t( cap(scale q[b, s, h] . k[b, t, g]) + mask[b, h, s, t] ) v[b, t, g]
    g = h // (heads / kv_heads)

Reading `[B, S, H, D]` directly removes the transposes around `scaled_dot_product_attention`, and head
offsets let q, k and v be views of one fused linear. A row with nothing to attend to is 0. Equal over the
reals to the ATen operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Cost, operator, tensor_bytes


def _cost(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, *rest: object) -> Cost:
    batch, queries = int(q.shape[0]), int(q.shape[1])
    keys, depth, width = int(k.shape[1]), int(q.shape[3]), int(v.shape[3])
    out = 4 * batch * queries * heads * width
    return Cost(0, tensor_bytes(q, k, v, mask) + out, 2 * batch * heads * queries * keys * (depth + width))


@operator(
    onnx_name="Attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, int kv_heads, int q_start, int k_start, "
        "int v_start, float scale, bool causal, float softcap) -> Tensor"
    ),
    shape=lambda q, k, v, mask, heads, *rest: q.new_empty([q.shape[0], q.shape[1], heads, v.shape[3]]),
    cost=_cost,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    q_start: int,
    k_start: int,
    v_start: int,
    scale: float,
    causal: bool,
    softcap: float,
) -> Tensor:
    """q `[B, S, Hq', D]`, k `[B, T, Hk', D]`, v `[B, T, Hv', Dv]`, mask bool or float → `[B, S, heads, Dv]`."""
    group = heads // kv_heads
    queries = q[:, :, q_start : q_start + heads].transpose(1, 2)
    keys = k[:, :, k_start : k_start + kv_heads].transpose(1, 2).repeat_interleave(group, 1)
    values = v[:, :, v_start : v_start + kv_heads].transpose(1, 2).repeat_interleave(group, 1)
    logits = queries @ keys.transpose(-1, -2) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if causal:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~visible, -torch.inf)
    blind = torch.isneginf(logits).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    return (weights @ values).transpose(1, 2).contiguous()
