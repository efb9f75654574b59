"""Default schedules: every kernel has threads and vectors, and gives what PyTorch gives, at all sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from torch import Tensor
from tvm import relax, te, tirx

from isofold.compiler.capture import capture
from isofold.runtimes.tvm.compile_cpu import cpu_target, scheduled
from isofold.runtimes.tvm.lower import lower
from isofold.runtimes.tvm.schedule_cpu import schedule_cpu, schedule_function, schedule_report
from isofold.runtimes.tvm.schedule_nests import SMALL, variables
from isofold.runtimes.tvm.virtual_machine import executable_pipeline

from .schedule_cases import CASES, DYNAMIC, Lambda, dynamic_shapes, other_sizes

KINDS = tirx.ForKind


def loops(stmt: Any) -> Iterator[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(stmt, (tirx.For, lambda loop: found.append(loop) or None))
    yield from found


def work(stmt: Any, around: frozenset[Any] = frozenset()) -> int:
    """Iterations of the largest nest; an unknown extent is 4096, mostly split for vectors, or the rest of such a split
    (it depends on a loop around it)."""
    if isinstance(stmt, tirx.For):
        if isinstance(stmt.extent, tirx.IntImm):
            extent = int(stmt.extent)
        else:
            extent = 16 if variables(stmt.extent) & around else 4096 // 16
        return extent * work(stmt.body, around | {stmt.loop_var})
    if isinstance(stmt, tirx.SeqStmt):
        return max(work(part, around) for part in stmt.seq)
    parts = [getattr(stmt, name, None) for name in ("body", "block", "then_case", "else_case")]
    return max([work(part, around) for part in parts if part is not None], default=1)


class Built:
    """A case lowered, scheduled and compiled."""

    def __init__(self, name: str, isa: str, dynamic: bool) -> None:
        function, args = CASES[name]
        shapes = dynamic_shapes(name, len(args)) if dynamic else None
        program = capture(Lambda(function).eval(), tuple(args), None, shapes)
        low = lower(program)
        target = cpu_target(f"llvm:x86-64-{isa}")
        self.module = scheduled(low.module, target)
        executable = relax.build(self.module, target=target, relax_pipeline=executable_pipeline())
        self.machine = relax.VirtualMachine(executable, tvm.cpu())
        tensors = lambda names: [tvm.runtime.tensor(program.tensors[n].numpy()) for n in names]  # noqa: E731
        prepared = list(self.machine["prepare"](*tensors(low.prepare))) if low.prepared else []
        self.weights = [*tensors(low.weights), *prepared]

    def __call__(self, args: Sequence[Tensor]) -> np.ndarray:
        out = self.machine["main"](*(tvm.runtime.tensor(a.contiguous().numpy()) for a in args), *self.weights)
        return out[0].numpy() if not isinstance(out, tvm.runtime.Tensor) else out.numpy()


def check(built: Built, name: str, args: Sequence[Tensor]) -> None:
    wide = [a.double() if a.is_floating_point() else a for a in args]
    expected = CASES[name][0](*wide).numpy()
    got = built(args)
    assert got.shape == expected.shape
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 1e-5, f"{name}: {error:.1e}; {schedule_report(built.module)}"


def unscheduled(module: tvm.IRModule) -> dict[str, str]:
    """Kernels of more than trivial size without threads or without vectors."""
    bad = {}
    for variable, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc) or work(function.body) <= SMALL:
            continue
        kinds = {loop.kind for loop in loops(function.body)}
        missing = [kind.name for kind in (KINDS.PARALLEL, KINDS.VECTORIZED) if kind not in kinds]
        if missing:
            bad[str(variable.name_hint)] = f"no loop is {' or '.join(missing)}"
    return bad


SERIAL = {"running sum"}
"""Each result needs the one before it."""


@pytest.mark.parametrize("name", CASES)
def test_fixed_sizes(name: str) -> None:
    built = Built(name, "v4" if _has_v4() else "v3", False)
    check(built, name, CASES[name][1])
    assert name in SERIAL or not unscheduled(built.module)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_sizes(name: str) -> None:
    built = Built(name, "v4" if _has_v4() else "v3", True)
    args = CASES[name][1]
    check(built, name, args)
    check(built, name, other_sizes(name, args))
    assert name in SERIAL or not unscheduled(built.module)


@pytest.mark.parametrize(
    "name",
    ["activations", "softmax of rows", "matrix product", "scores", "conv2d", "depthwise", "sum of all"],
)
def test_the_other_instruction_set(name: str) -> None:
    built = Built(name, "v3", False)
    check(built, name, CASES[name][1])
    assert not unscheduled(built.module)


def _has_v4() -> bool:
    return "v4" in str(cpu_target("tvm-cpu").attrs["mcpu"])


def _product(m: Any, n: Any, k: Any) -> tirx.PrimFunc:
    axis = te.reduce_axis((0, k), "k")
    a, b = te.placeholder((m, k), "float32", "a"), te.placeholder((k, n), "float32", "b")
    c = te.compute((m, n), lambda i, j: te.sum(a(i, axis) * b(axis, j), axis=axis), "c")
    return te.create_prim_func([a, b, c], "int64")


def test_the_ends_of_tiles_at_every_size() -> None:
    m, n, k = (tirx.Var(name, "int64") for name in "mnk")
    target = cpu_target("tvm-cpu")
    function = schedule_function(_product(m, n, k), target).with_attr("global_symbol", "main")
    run = tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]
    rng = np.random.default_rng(0)
    for rows, columns, inner in [
        (1, 1, 1),
        (8, 32, 5),
        (7, 31, 4),
        (9, 33, 3),
        (17, 65, 7),
        (25, 100, 2),
        (3, 64, 1),
    ]:
        x, y = (rng.standard_normal(s).astype(np.float32) for s in ((rows, inner), (inner, columns)))
        got = tvm.runtime.tensor(np.full((rows, columns), np.nan, np.float32))
        run(tvm.runtime.tensor(x), tvm.runtime.tensor(y), got)
        assert np.abs(got.numpy() - x.astype(np.float64) @ y).max() < 1e-5, (rows, columns, inner)


def guarded(shape: Sequence[int]) -> tuple[Any, np.ndarray]:
    """A tensor, and the memory around it: 256 floats of 77 on both sides."""
    size = int(np.prod(shape))
    whole = np.full(size + 512 + 16, 77, np.float32)
    start = -whole.ctypes.data % 64 // 4
    whole = whole[start : start + size + 512]
    inside = whole[256 : 256 + size].reshape(shape)
    inside[:] = np.nan
    return tvm.runtime.from_dlpack(inside), whole


@pytest.mark.parametrize(
    "shape", [(300, 300), (1, 20000), (3, 7), (20011,), (90, 160), (65, 130), (8193, 1), (5, 3001)]
)
@pytest.mark.parametrize("kind", ["copy", "turned", "sum", "product"])
def test_nothing_is_written_behind_the_end(shape: tuple[int, ...], kind: str) -> None:
    x = te.placeholder(shape, "float32", "x")
    rng = np.random.default_rng(0)
    given = rng.standard_normal(shape).astype(np.float32)
    if kind == "copy" or len(shape) == 1:
        y = te.compute(shape, lambda *i: x(*i) * 2.0, "y")
        expected = given * 2
    elif kind == "turned":
        y = te.compute(shape[::-1], lambda i, j: x(j, i) + 1.0, "y")
        expected = given.T + 1
    elif kind == "sum":
        axis = te.reduce_axis((0, shape[1]), "r")
        y = te.compute(shape[:1], lambda i: te.sum(x(i, axis), axis=axis), "y")
        expected = given.astype(np.float64).sum(1)
    else:
        axis = te.reduce_axis((0, shape[0]), "r")
        y = te.compute(
            (shape[1], 37), lambda i, j: te.sum(x(axis, i) * x(axis, j % shape[1]), axis=axis), "y"
        )
        expected = given.T.astype(np.float64) @ given[:, np.arange(37) % shape[1]]
    target = cpu_target("tvm-cpu")
    function = schedule_function(te.create_prim_func([x, y], "int64"), target)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    result, whole = guarded(expected.shape)
    tvm.compile(module, target=target)["main"](tvm.runtime.tensor(given), result)
    assert np.abs(result.numpy() - expected).max() < 1e-4 * np.abs(expected).max(), function.attrs[
        "isofold.schedule"
    ]
    assert (whole[:256] == 77).all()
    assert (whole[-256:] == 77).all(), function.attrs["isofold.schedule"]


def test_conditions_leave_the_inside_of_tiles() -> None:
    function = schedule_function(_product(130, 70, 50), cpu_target("tvm-cpu"))
    for loop in loops(function.body):
        if loop.kind == KINDS.VECTORIZED:
            found: list[Any] = []
            tvm_ffi.structural_walk(
                loop.body, (tirx.IfThenElse, lambda s, found=found: found.append(s) or None)
            )
            assert not found


def test_scheduled_functions_are_left_alone_and_named_in_the_report() -> None:
    target = cpu_target("tvm-cpu")
    once = schedule_cpu(tvm.IRModule({"product": _product(64, 64, 64)}), target)
    twice = schedule_cpu(once, target)
    assert once["product"].same_as(twice["product"])
    assert schedule_report(once)["product"].startswith("c: contraction: ")


def test_a_function_that_all_threads_sum_is_the_same_every_time() -> None:
    built = Built("sum of all", "v4" if _has_v4() else "v3", False)
    args = CASES["sum of all"][1]
    assert len({float(built(args)) for _ in range(20)}) == 1
    assert torch.allclose(torch.tensor(float(built(args))), args[0].sum(), rtol=1e-4)
