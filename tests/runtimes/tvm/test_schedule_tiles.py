"""Sums of tiles whose rows lie at unknown distances are kept in arrays of their own, and are the same sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from isofold.runtimes.tvm.compile_cpu import cpu_target
from isofold.runtimes.tvm.schedule_cpu import ATTRIBUTE, schedule_function
from isofold.runtimes.tvm.schedule_nests import every
from isofold.runtimes.tvm.schedule_rules import Shape


def columns(rows: int, units: Any) -> tirx.PrimFunc:
    """c[o, i] = sum of a[o, k] b[k, i] over 40 k, for 32 units i."""
    axis = te.reduce_axis((0, 40), "k")
    a, b = te.placeholder((rows, 40), "float32", "a"), te.placeholder((40, units * 32), "float32", "b")
    c = te.compute((rows, units * 32), lambda o, i: te.sum(a(o, axis) * b(axis, i), axis=axis), "c")
    return te.create_prim_func([a, b, *([units] if isinstance(units, tirx.Var) else []), c], "int64")


def tiles_of(function: tirx.PrimFunc) -> list[list[int]]:
    """Shapes of arrays that a function has for tiles."""
    found = [alloc.buffer for alloc in every(function.body, tirx.AllocBuffer)]
    return [[int(s) for s in buffer.shape] for buffer in found if buffer.name.endswith("_tile")]


@pytest.mark.parametrize("features", ["llvm:x86-64-v3", "llvm:x86-64-v4"])
def test_a_tile_is_kept_and_written_once(features: str) -> None:
    target = cpu_target(features)
    shape = Shape.of(target)
    rows = 2 * shape.rows
    function = schedule_function(columns(rows, tirx.Var("n", "int64")), target)
    assert "contraction" in str(function.attrs[ATTRIBUTE])
    assert tiles_of(function) == [[shape.rows, shape.columns]]
    stored = [store.buffer.name for store in every(function.body, tirx.BufferStore)]
    assert sorted(stored) == ["c", "c_tile", "c_tile"]


@pytest.mark.parametrize(
    ("rows", "units", "tiles"), [(16, 2, []), (13, None, [[8, 32], [5, 32]]), (1, None, [])]
)
def test_what_llvm_can_tell_apart_is_left_alone_and_ends_have_tiles_of_their_own(
    rows: int, units: int | None, tiles: list[list[int]]
) -> None:
    n = tirx.Var("n", "int64") if units is None else units
    function = schedule_function(columns(rows, n), cpu_target("llvm:x86-64-v4"))
    assert sorted(tiles_of(function)) == sorted(tiles)


@pytest.mark.parametrize("rows", [16, 13, 1])
def test_the_sums_are_the_same(rows: int) -> None:
    target = cpu_target("tvm-cpu")
    function = schedule_function(columns(rows, tirx.Var("n", "int64")), target)
    main = function.with_attr("global_symbol", "main")
    run = tvm.compile(tvm.IRModule({"main": main}), target=target)["main"]
    rng = np.random.default_rng(0)
    for n in (1, 3):
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rows, 40), (40, 32 * n)))
        out = tvm.runtime.tensor(np.full((rows, 32 * n), np.nan, np.float32))
        run(tvm.runtime.tensor(a), tvm.runtime.tensor(b), n, out)
        np.testing.assert_allclose(out.numpy(), a @ b, rtol=0, atol=1e-4)
