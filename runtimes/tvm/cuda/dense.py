"""Float linears on panels of float32 weights, `P[b, k, j] = W[32 b + j, k]`, in float32 throughout.

Few rows: a block takes a panel, its warps share the inputs between them; a lane is a row of the panel, so that a warp
reads 128 consecutive bytes for each input, and 8 tokens are multiplied with what it read. Many rows: a block takes a
panel and 64 tokens, with 32 inputs of both in shared memory; a thread computes eight tokens of a row. (Tuning may find
other numbers of tokens and warps.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.linear_packed import packed_rows
from ....compiler.dialect.packing import LANES
from .builder import (
    Frame,
    Tensor,
    bind,
    ceil_div,
    div,
    get,
    launch,
    local,
    loop,
    mod,
    put,
    shared,
    sync,
    value,
    when,
    wide,
)
from .epilogue import Linear
from .linears import FEW_ROWS, add, add_choice
from .plan import Call, Plan

PANEL = 32
FEW, MANY, WARPS = 8, 64, 8
"""Tokens and warps of a block, unless tuned."""
DEPTH = 32
"""Inputs in shared memory at a time."""


@dataclass(frozen=True)
class _Dense:
    """What both kernels have in common."""

    linear: Linear

    @property
    def panels(self) -> int:
        """Panels of the weight."""
        return -(-packed_rows(self.linear.n, self.linear.gated) // PANEL)

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        linear = self.linear
        weight = Tensor("weight", (self.panels * linear.k * PANEL,), "float32")
        return [Tensor("x", (linear.rows, linear.k), "float32"), weight, *linear.tensors()]

    def _write(self, frame: Frame, panel: Any, row: Any, token: Any, total: Any) -> None:
        """Finish one sum of a panel's row; of gated ones the gate's lane does, with the up row's sum 16 lanes away."""
        linear = self.linear
        there: Any = wide(token) < wide(frame.size(linear.rows))
        feature, up = panel * PANEL + row, None
        if linear.gated:
            up = value("float32", "iso_shuffle_xor", total, LANES)
            feature = panel * LANES + row
            there = T.And(there, row < LANES)
        with when(T.And(there, feature < linear.n)):
            linear.finish(frame, token, bind(feature), total, up)


@dataclass(frozen=True)
class DenseFew(_Dense):
    """The kernel for few rows."""

    tokens: int = FEW
    warps: int = WARPS

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"dense_few_{self.linear.tag}"

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        linear, k, tokens, warps = self.linear, self.linear.k, self.tokens, self.warps
        rows = wide(frame.size(linear.rows))
        with launch([self.panels, ceil_div(frame.size(linear.rows), tokens)], 32 * warps) as (
            (panel, column),
            tx,
        ):
            warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
            sums, starts = local(tokens), []
            for i in range(tokens):
                put(sums, i, T.float32(0))
                starts.append(bind(T.min(wide(column * tokens + i), rows - 1) * k))
            with loop(0, -(-k // warps)) as turn:
                at_ = bind(turn * warps + warp)
                with when(True if k % warps == 0 else at_ < k):
                    weight = bind(get(frame["weight"], wide(panel) * (k * PANEL) + wide(at_ * PANEL + lane)))
                    for i in range(tokens):
                        put(sums, i, get(sums, i) + weight * get(frame["x"], starts[i] + wide(at_)))
            board = shared(warps * tokens * PANEL)
            for i in range(tokens):
                put(board, (warp * tokens + i) * PANEL + lane, get(sums, i))
            sync()
            # A warp finishes a token, and then the next.
            for first in range(0, tokens, warps):
                token = bind(warp + first)
                with when(True if tokens % warps == 0 else token < tokens):
                    total = get(board, token * PANEL + lane)
                    for other in range(1, warps):
                        total = total + get(board, (other * tokens + token) * PANEL + lane)
                    self._write(frame, panel, lane, bind(column * tokens + token), bind(total))


@dataclass(frozen=True)
class DenseMany(_Dense):
    """The kernel for many rows."""

    tokens: int = MANY
    warps: int = WARPS

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"dense_many_{self.linear.tag}"

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        linear, k, warps = self.linear, self.linear.k, self.warps
        rows, each = wide(frame.size(linear.rows)), self.tokens // warps
        with launch([self.panels, ceil_div(frame.size(linear.rows), self.tokens)], 32 * warps) as (
            (panel, column),
            tx,
        ):
            warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
            weights, tokens, sums = shared(DEPTH * PANEL), shared(self.tokens * DEPTH), local(each)
            for i in range(each):
                put(sums, i, T.float32(0))
            with loop(0, -(-k // DEPTH)) as stage:
                for i in range(DEPTH // warps):
                    step = bind(warp * (DEPTH // warps) + i)
                    at_ = bind(stage * DEPTH + step)
                    put(weights, step * PANEL + lane, T.float32(0))
                    with when(at_ < k):
                        index = wide(panel) * (k * PANEL) + wide(at_ * PANEL + lane)
                        put(weights, step * PANEL + lane, get(frame["weight"], index))
                for i in range(each):
                    token = bind(warp * each + i)
                    row = T.min(wide(column * self.tokens + token), rows - 1)
                    put(tokens, token * DEPTH + lane, T.float32(0))
                    with when(stage * DEPTH + lane < k):
                        put(
                            tokens,
                            token * DEPTH + lane,
                            get(frame["x"], row * k + wide(stage * DEPTH + lane)),
                        )
                sync()
                with loop(0, DEPTH) as step:
                    weight = bind(get(weights, step * PANEL + lane))
                    for i in range(each):
                        put(sums, i, get(sums, i) + weight * get(tokens, (warp * each + i) * DEPTH + step))
                sync()
            for i in range(each):
                self._write(
                    frame, panel, lane, bind(column * self.tokens + warp * each + i), bind(get(sums, i))
                )


def linear_dense(call: Call) -> Plan:
    """`isofold.linear_dense`."""
    plan, a = Plan(), call.attributes
    rows = plan.rows(call["x"])
    plan.view("x", rows, int(call["x"].shape[-1]))
    plan.flat(call, "weight", "bias")
    linear = Linear(
        rows, a["k"], a["n"], a["activation"], bool(a["gated"]), call.has("bias"), call.has("residual")
    )
    if call.has("residual"):
        plan.view("residual", rows, linear.n)
    few, many = DenseFew(linear), DenseMany(linear)
    if isinstance(rows, int):
        add(plan, few if rows <= FEW_ROWS else many)
    else:
        add_choice(plan, [(FEW_ROWS, few)], many)
    plan.results = ("y",)
    return plan
