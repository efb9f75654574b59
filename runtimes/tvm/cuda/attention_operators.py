"""The plans of `isofold.attention` and `isofold.attention_cached`.

| queries | kernels |
|---|---|
| up to 16 | `attention.FewQueries`, keys split over blocks, and `attention.Combine` |
| more | `flash.ManyQueries` |

Where the number of queries is not known when compiling, the host chooses when it launches.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.cache_packing import pair_count, row_bytes
from ....compiler.errors import UnsupportedError
from .attention import Attention, Combine, FewQueries, few_rows
from .builder import Frame, Size, Tensor, prim_func
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
WIDEST = 352
"""Widest head: what fits the static shared memory of a block of few queries."""


def attention(call: Call) -> Plan:
    """`isofold.attention`."""
    plan = Plan()
    return _attend(plan, _shape(plan, call))


def attention_cached(call: Call) -> Plan:
    """`isofold.attention_cached`."""
    plan = Plan()
    return _attend(plan, _cached_shape(plan, call))


def _attend(plan: Plan, shape: Attention) -> Plan:
    if max(shape.depth, shape.width) > WIDEST:
        raise UnsupportedError(
            "Heads of an attention are too wide for one block",
            expected=f"at most {WIDEST} dimensions",
            got=f"{shape.depth} and {shape.width}",
        )
    keys, queries = shape.keys, shape.queries
    plan.results = ("y",)
    if isinstance(queries, int) and queries > FEW_QUERIES:
        add(plan, ManyQueries(shape))
        return plan
    splits = SPLITS if isinstance(keys, str) else max(1, min(SPLITS, -(-keys // RANGE)))
    few = tuned(FewQueries(shape, splits, few_rows(shape)))
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
    mask = _mask(plan, call, batch, queries, keys)
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


def _cached_shape(plan: Plan, call: Call) -> Attention:
    a, q, k = call.attributes, call["q"], call["k"]
    batch, queries, keys = plan.size("b", q.shape[0]), plan.size("s", q.shape[1]), plan.size("t", k.shape[2])
    depth, width, kv_heads = a["depth"], a["value_depth"], a["kv_heads"]
    q_heads = int(q.shape[2])
    plan.view("q", batch, queries, q_heads, depth)
    for name, size in (("k", depth), ("v", width)):
        plan.view(name, batch, kv_heads, keys, row_bytes(size, a["bits"]))
        plan.view(f"{name}_params", batch, kv_heads, keys, 2 * pair_count(size, a["group"]))
    mask = _mask(plan, call, batch, queries, keys)
    return Attention(
        batch, queries, keys, a["heads"], kv_heads, depth, width, q_heads, kv_heads, kv_heads, a["q_start"], 0, 0,
        float(a["scale"]), bool(a["causal"]), float(a["softcap"]), mask, call["mask"].dtype if mask else "bool",
        a["bits"], a["group"],
    )  # fmt: skip


def _mask(plan: Plan, call: Call, batch: Size, queries: Size, keys: Size) -> tuple[Size, ...] | None:
    """Sizes of the mask's dimensions, its view in the plan; None where there is no mask."""
    if not call.has("mask"):
        return None
    sizes = [1] * (4 - len(call["mask"].shape)) + list(call["mask"].shape)
    full = (batch, call.attributes["heads"], queries, keys)
    mask = tuple(1 if isinstance(s, int) and s == 1 else full[i] for i, s in enumerate(sizes))
    plan.view("mask", *mask)
    return mask
