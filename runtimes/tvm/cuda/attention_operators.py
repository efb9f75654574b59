"""The plan of `isofold.attention`.

| queries | kernels |
|---|---|
| up to 16 | `attention.FewQueries`, keys split over blocks, and `attention.Combine` |
| more | `flash.ManyQueries` |

Where the number of queries is not known when compiling, the host chooses when it launches.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from .attention import Attention, Combine, FewQueries
from .builder import Frame, Tensor, prim_func
from .flash import ManyQueries
from .knobs import tuned
from .linears import add
from .plan import Call, Plan, Stage

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
    keys, queries = shape.keys, shape.queries
    plan.results = ("y",)
    if isinstance(queries, int) and queries > FEW_QUERIES:
        add(plan, ManyQueries(shape))
        return plan
    splits = SPLITS if isinstance(keys, str) else max(1, min(SPLITS, -(-keys // RANGE)))
    few = tuned(FewQueries(shape, splits))
    combine = Combine(shape, few.splits) if few.splits > 1 else None
    if isinstance(queries, int):
        add(plan, few)
        if combine is not None:
            add(plan, combine)
    else:
        _add_choice(plan, few, combine, tuned(ManyQueries(shape)))
    return plan


def _add_choice(plan: Plan, few: FewQueries, combine: Combine | None, many: ManyQueries) -> None:
    """Append two functions: parts of few queries, then the result from the parts or of many queries."""
    shape = few.shape
    queries = shape.queries

    def choose(frame: Frame, then: Any, otherwise: Any) -> None:
        with T.If(frame.size(queries) <= FEW_QUERIES):
            with T.Then():
                then(frame)
            if otherwise is not None:
                with T.Else():
                    otherwise(frame)

    if combine is None:
        _append(
            plan,
            f"{many.name}_or_few",
            few.inputs(),
            [shape.output()],
            lambda f: choose(f, few.emit, many.emit),
        )
        return
    _append(plan, few.name, few.inputs(), few.outputs(), lambda f: choose(f, few.emit, None))
    inputs = [*combine.inputs(), *many.inputs()]
    _append(plan, many.name, inputs, [shape.output()], lambda f: choose(f, combine.emit, many.emit))


def _append(plan: Plan, name: str, inputs: list[Tensor], outputs: list[Tensor], emit: Any) -> None:
    function = prim_func(name, [*inputs, *outputs], emit)
    plan.stages.append(Stage(function, tuple(t.name for t in inputs), tuple(outputs)))


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
        batch,
        queries,
        keys,
        a["heads"],
        a["kv_heads"],
        depth,
        width,
        heads[0],
        heads[1],
        heads[2],
        a["q_start"],
        a["k_start"],
        a["v_start"],
        float(a["scale"]),
        bool(a["causal"]),
        float(a["softcap"]),
        mask,
        call["mask"].dtype if mask else "bool",
    )
