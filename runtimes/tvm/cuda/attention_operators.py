"""The plan of `isofold.attention`."""

from __future__ import annotations

from .attention import Attention, Combine, FewQueries
from .linears import add
from .plan import Call, Plan

FEW_QUERIES = 16
"""Queries up to which keys are split over blocks."""
RANGE = 256
"""Keys that are worth a block of their own."""
SPLITS = 16
"""Most ranges of keys."""


def attention(call: Call) -> Plan:
    """`isofold.attention`."""
    plan = Plan()
    shape = _shape(plan, call)
    keys = shape.keys
    splits = SPLITS if isinstance(keys, str) else max(1, min(SPLITS, -(-keys // RANGE)))
    add(plan, FewQueries(shape, splits))
    if splits > 1:
        add(plan, Combine(shape, splits))
    plan.results = ("y",)
    return plan


def _shape(plan: Plan, call: Call) -> Attention:
    a, q, k, v = call.attributes, call["q"], call["k"], call["v"]
    batch, queries, keys = plan.size("b", q.shape[0]), plan.size("s", q.shape[1]), plan.size("t", k.shape[1])
    depth, width = int(q.shape[3]), int(v.shape[3])
    heads = [int(x.shape[2]) for x in (q, k, v)]
    plan.view("q", batch, queries, heads[0], depth)
    plan.view("k", batch, keys, heads[1], depth)
    plan.view("v", batch, keys, heads[2], width)
    mask = None
    if call.has("mask"):
        sizes = [1] * (4 - len(call["mask"].shape)) + list(call["mask"].shape)
        full = (batch, a["heads"], queries, keys)
        mask = tuple(1 if isinstance(s, int) and s == 1 else full[i] for i, s in enumerate(sizes))
        plan.view("mask", *mask)
    return Attention(
        batch, queries, keys, a["heads"], a["kv_heads"], depth, width, *heads, a["q_start"], a["k_start"], a["v_start"],
        float(a["scale"]), bool(a["causal"]), float(a["softcap"]), mask, call["mask"].dtype if mask else "bool",
    )  # fmt: skip
