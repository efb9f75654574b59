"""Linears whose rows choose their matrix: a block takes one row, and a panel of its expert's matrix.

What a decode step has are few rows with an expert each: all that is read are the weights of those experts, once. The
warps of a block share the inputs between them; a lane decodes units of eight inputs for four rows of a packed panel,
or is a row of a float panel. Products are on CUDA cores, in int32 or float32. Rows that chose the same expert do not
share what is read (prompts are not grouped).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.tirx.script.builder import ir as T

from ....compiler.dialect.packing import LANES, ceil_to
from .builder import (
    Frame,
    Size,
    Tensor,
    at,
    bind,
    call,
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
from .dense import PANEL
from .epilogue import Linear
from .linears import add, integer_weights
from .plan import Call, Plan
from .pointwise import add_pointwise
from .weights import Activations, Weights

WARPS = 8
UNIT = 8
"""Inputs that a lane decodes at a time."""


@dataclass(frozen=True)
class _Grouped:
    """What both kernels have in common: `rows` rows of k inputs, n outputs, the matrices of `experts`."""

    rows: Size
    experts: int
    k: int
    n: int
    bias: bool

    @property
    def tag(self) -> str:
        """A part of kernels' names."""
        return f"{self.experts}x{self.n}x{self.k}{'_b' if self.bias else ''}"

    def last_tensors(self) -> list[Tensor]:
        """Bias where there is one, and the result."""
        bias = [Tensor("bias", (self.experts * self.n,), "float32")] if self.bias else []
        return [*bias, Tensor("y", (self.rows, self.n), "float32")]

    def own(self, frame: Frame, token: Any) -> tuple[Any, Any]:
        """The token's expert (int64; 0 where it has none), and whether it has one."""
        chosen = bind(get(frame["expert"], token))
        there = bind(T.And(chosen >= wide(0), chosen < wide(self.experts)))
        return bind(T.Select(there, chosen, wide(0))), there

    def finish(self, frame: Frame, token: Any, feature: Any, own: Any, there: Any, total: Any) -> None:
        """Write an output."""
        if self.bias:
            total = total + get(frame["bias"], own * self.n + wide(feature))
        put(frame["y"], wide(token) * self.n + wide(feature), T.Select(there, total, T.float32(0)))


@dataclass(frozen=True)
class GroupedRows(_Grouped):
    """Packed weights."""

    weights: Weights
    activations: Activations
    static_params: bool = False

    @property
    def name(self) -> str:
        """The kernel's name."""
        kind = "a16" if self.activations == "float" else "a8s" if self.static_params else "a8"
        return f"grouped_{self.weights.tag}_{kind}_{self.tag}"

    @property
    def kp(self) -> int:
        """Inputs with padding."""
        return self.weights.padded(self.k)

    @property
    def padded(self) -> int:
        """Rows of an expert's packed matrix."""
        return ceil_to(self.n, LANES)

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        if self.activations == "codes":
            pair = (2,) if self.static_params else (self.rows, 2)
            first = [Tensor("u", (self.rows, self.kp), "uint8"), Tensor("params", pair, "float32")]
            sums = [Tensor("wsum", (self.experts * self.padded,), "float32")]
        else:
            first, sums = [Tensor("x", (self.rows, self.k), "float32")], []
        # All experts' panels, one behind the other.
        tall = Linear(self.rows, self.k, self.experts * self.padded, "none", False, False, False)
        weights = self.weights.tensors(tall, self.kp)
        return [*first, Tensor("expert", (self.rows,), "int64"), *weights, *sums, *self.last_tensors()]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        units, panels = self.kp // UNIT, self.padded // LANES
        warps = max(1, min(WARPS, -(-units // UNIT)))
        with launch([frame.size(self.rows), panels], 32 * warps) as ((token, panel), tx):
            warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
            quad, part = bind(mod(lane, 4)), bind(warp * 8 + div(lane, 4))
            own, there = self.own(frame, token)
            tall = bind(own * panels + wide(panel))
            sums = local(4)
            for row in range(4):
                put(sums, row, T.float32(0))
            with loop(0, -(-units // (8 * warps))) as turn:
                unit = bind(turn * (8 * warps) + part)
                with when(True if units % (8 * warps) == 0 else unit < units):
                    self._unit(frame, token, tall, unit, quad, sums)
            board = shared(warps * LANES)
            for row in range(4):
                total = get(sums, row)
                for mask in (4, 8, 16):
                    total = bind(total + value("float32", "iso_shuffle_xor", total, mask))
                with when(lane < 4):
                    put(board, warp * LANES + quad * 4 + row, total)
            sync()
            feature = bind(panel * LANES + tx)
            with when(T.And(tx < LANES, feature < self.n)):
                total = get(board, tx)
                for other in range(1, warps):
                    total = total + get(board, other * LANES + tx)
                packed = bind(own * self.padded + wide(feature))
                total = bind(self.weights.finish(frame, total, packed))
                if self.activations == "codes":
                    pair = 0 if self.static_params else wide(token) * 2
                    s, z = get(frame["params"], pair), get(frame["params"], pair + 1)
                    total = bind(s * (total - z * get(frame["wsum"], packed)))
                self.finish(frame, token, feature, own, there, total)

    def _unit(self, frame: Frame, token: Any, panel: Any, unit: Any, quad: Any, sums: Any) -> None:
        """Eight inputs with four rows."""
        weights, codes = self.weights, self.activations == "codes"
        kind = "int32" if codes else "float32"
        registers = local(weights.layout.words, "uint32")
        weights.layout.read(frame["weight"], panel, self.kp, unit, quad, registers)
        size = weights.group_size
        index = bind(
            weights.scale_index(self.kp, panel, wide(div(unit * UNIT, size)) if size else wide(0), quad)
        )
        x = self._codes(frame, token, unit) if codes else self._floats(frame, token, unit)
        added = bind(sum(x[1:], x[0])) if weights.zero else None
        scales: list[Any] = [T.float32(1)] * 4
        if weights.grouped:
            words = local(2, "uint32")
            call("iso_load8", at(words, 0), at(frame["scale"], index))
            scales = weights.scales(words)
        for row in range(4):
            pair = local(2, "uint32")
            weights.layout.byte_words(registers, row, unit, pair)
            total: Any = None
            for j in range(UNIT):
                byte = T.cast(value("int32", "iso_signed_byte", get(pair, j // 4), j % 4), kind)
                total = byte * x[j] if total is None else total + byte * x[j]
            if added is not None:
                step = int(weights.layout.factor) // weights.zero_steps
                total = total - T.cast(get(frame["zero"], index + row), kind) * T.cast(step, kind) * added
            put(sums, row, get(sums, row) + scales[row] * T.cast(total, "float32"))

    def _codes(self, frame: Frame, token: Any, unit: Any) -> list[Any]:
        words = local(2, "uint32")
        call("iso_load8", at(words, 0), at(frame["u"], wide(token) * self.kp + wide(unit * UNIT)))
        return [
            T.cast(get(words, j // 4) >> T.uint32(8 * (j % 4)) & T.uint32(255), "int32") for j in range(UNIT)
        ]

    def _floats(self, frame: Frame, token: Any, unit: Any) -> list[Any]:
        """With zeros behind the row."""
        x = local(UNIT)
        for j in range(UNIT):
            put(x, j, T.float32(0))
            with when(True if self.k == self.kp else unit * UNIT + j < self.k):
                put(x, j, get(frame["x"], wide(token) * self.k + wide(unit * UNIT + j)))
        return [get(x, j) for j in range(UNIT)]


@dataclass(frozen=True)
class GroupedDense(_Grouped):
    """Panels of float32 weights."""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return f"grouped_dense_{self.tag}"

    @property
    def panels(self) -> int:
        """Panels of an expert."""
        return -(-self.n // PANEL)

    def tensors(self) -> list[Tensor]:
        """Arguments, in order."""
        weight = Tensor("weight", (self.experts * self.panels * self.k * PANEL,), "float32")
        first = [Tensor("x", (self.rows, self.k), "float32"), Tensor("expert", (self.rows,), "int64")]
        return [*first, weight, *self.last_tensors()]

    def emit(self, frame: Frame) -> None:
        """Write the kernel."""
        k = self.k
        with launch([frame.size(self.rows), self.panels], 32 * WARPS) as ((token, panel), tx):
            warp, lane = bind(div(tx, 32)), bind(mod(tx, 32))
            own, there = self.own(frame, token)
            start = bind((own * self.panels + wide(panel)) * (k * PANEL))
            sums = local(1)
            put(sums, 0, T.float32(0))
            with loop(0, -(-k // WARPS)) as turn:
                at_ = bind(turn * WARPS + warp)
                with when(True if k % WARPS == 0 else at_ < k):
                    weight = get(frame["weight"], start + wide(at_ * PANEL + lane))
                    put(sums, 0, get(sums, 0) + weight * get(frame["x"], wide(token) * k + wide(at_)))
            board = shared(WARPS * PANEL)
            put(board, warp * PANEL + lane, get(sums, 0))
            sync()
            feature = bind(panel * PANEL + lane)
            with when(T.And(warp < 1, feature < self.n)):
                total = get(board, lane)
                for other in range(1, WARPS):
                    total = total + get(board, other * PANEL + lane)
                self.finish(frame, token, feature, own, there, bind(total))


def _rows(plan: Plan, call_: Call, source: str) -> Size:
    """Rows of the call, with views of what has some."""
    rows = plan.rows(call_[source])
    plan.view(source, rows, int(call_[source].shape[-1]))
    plan.view("expert", rows)
    return rows


def linear_grouped_packed(call_: Call) -> Plan:
    """`isofold.linear_grouped_packed`."""
    return _packed(call_, "u", "codes", len(call_["params"].shape) == 1)


def linear_grouped_packed_float(call_: Call) -> Plan:
    """`isofold.linear_grouped_packed_float`."""
    return _packed(call_, "x", "float", False)


def _packed(call_: Call, source: str, activations: Activations, static: bool) -> Plan:
    plan, a, weights = Plan(), call_.attributes, integer_weights(call_)
    rows = _rows(plan, call_, source)
    if activations == "codes":
        plan.view("params", *((2,) if static else (rows, 2)))
    plan.flat(call_, "weight", "scale", "zero", "wsum", "bias")
    if weights.group_size:
        plan.constants["multiplier"] = np.array([a["scale_multiplier"]], dtype=np.float32)
    experts = int(call_["weight"].shape[0])
    add(plan, GroupedRows(rows, experts, a["k"], a["n"], call_.has("bias"), weights, activations, static))
    plan.results = ("y",)
    return plan


def linear_grouped_dense(call_: Call) -> Plan:
    """`isofold.linear_grouped_dense`."""
    plan, a = Plan(), call_.attributes
    rows = _rows(plan, call_, "x")
    plan.flat(call_, "weight", "bias")
    experts = int(call_["weight"].shape[0])
    add(plan, GroupedDense(rows, experts, a["k"], a["n"], call_.has("bias")))
    plan.results = ("y",)
    return plan


def linear_grouped(call_: Call) -> Plan:
    """`isofold.linear_grouped`: weights as they are, where no pass could store them in panels; a thread an output."""
    plan = Plan()
    rows = _rows(plan, call_, "input")
    experts, n, k = (int(s) for s in call_["weight"].shape)
    plan.flat(call_, "weight", "bias")
    kernel = _Grouped(rows, experts, k, n, call_.has("bias"))
    *bias, output = kernel.last_tensors()
    inputs = [Tensor("input", (rows, k), "float32"), Tensor("expert", (rows,), "int64")]
    inputs += [Tensor("weight", (experts * n * k,), "float32"), *bias]

    def body(frame: Frame, i: Any) -> Any:
        token, feature = bind(T.truncdiv(i, wide(n))), bind(T.truncmod(i, wide(n)))
        own, there = kernel.own(frame, token)
        sums = local(1)
        put(sums, 0, get(frame["bias"], own * n + feature) if kernel.bias else T.float32(0))
        with loop(0, k) as at_:
            weight = get(frame["weight"], (own * n + feature) * k + wide(at_))
            put(sums, 0, get(sums, 0) + weight * get(frame["input"], token * k + wide(at_)))
        return T.Select(there, get(sums, 0), T.float32(0))

    add_pointwise(plan, f"linear_grouped_{kernel.tag}", inputs, output, body)
    plan.results = ("y",)
    return plan
