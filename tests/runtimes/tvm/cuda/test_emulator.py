"""The emulator shows what it is for: lanes of products, missing barriers and waits, barriers that not all reach."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from isofold.runtimes.tvm.cuda.builder import (
    Frame,
    Tensor,
    at,
    call,
    get,
    launch,
    local,
    prim_func,
    put,
    shared,
    sync,
    wide,
)
from isofold.runtimes.tvm.cuda.emulate import emulated

from ....processes import PATIENCE


def run(tmp_path: Path, tensors: list[Tensor], emit: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The last tensor after one call of a kernel."""
    module = emulated({"kernel": prim_func("kernel", tensors, emit)}, tmp_path)
    given = [tvm.runtime.tensor(arrays[t.name]) for t in tensors]
    module["kernel"](*given)
    return given[-1].numpy()


def test_product_of_halves_has_the_lanes_of_ptx(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)

    def pair(matrix: np.ndarray, rows: list[int], columns: list[int]) -> int:
        values = [matrix[r, c] for r in rows for c in columns]
        return int(np.array(values, np.float16).view(np.uint32)[0])

    words = np.zeros((32, 6), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        words[lane, :4] = [pair(a, [r], [c, c + 1]) for c in (2 * t, 2 * t + 8) for r in (g, g + 8)]
        words[lane, 4:] = [pair(b, [r, r + 1], [g]) for r in (2 * t, 2 * t + 8)]

    def emit(k: Frame) -> None:
        with launch([1], 32) as (_, tx):
            operands, sums = local(6, "uint32"), local(4)
            for i in range(6):
                put(operands, i, get(k["words"], tx * 6 + i))
            for i in range(4):
                put(sums, i, 0.0)
            call("iso_mma_f16", at(sums, 0), at(operands, 0), at(operands, 4))
            for i in range(4):
                put(k["c"], tx * 4 + i, get(sums, i))

    tensors = [Tensor("words", (32, 6), "uint32"), Tensor("c", (32, 4), "float32")]
    c = run(tmp_path, tensors, emit, {"words": words, "c": np.zeros((32, 4), np.float32)})
    product = a.astype(np.float32) @ b.astype(np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        wanted = [product[r, 2 * t + i] for r in (g, g + 8) for i in range(2)]
        np.testing.assert_allclose(c[lane], wanted, rtol=1e-5, atol=1e-5)


def sparse_operands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (16 x 64, 2 of every 4 stored) and B (64 x 8), and the words of their lanes: A's 4, B's 4 and the indices."""
    places = np.array([sorted(rng.choice(4, 2, replace=False)) for _ in range(16 * 16)]).reshape(16, 16, 2)
    stored = rng.integers(-128, 128, (16, 16, 2)).astype(np.int8)
    a = np.zeros((16, 16, 4), np.int8)
    np.put_along_axis(a, places, stored, 2)
    b = rng.integers(0, 256, (64, 8)).astype(np.uint8)
    words = np.zeros((32, 9), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        values = stored.reshape(16, 32)
        parts = [values[r, c : c + 4] for c in (4 * t, 4 * t + 16) for r in (g, g + 8)]
        parts += [b[16 * i + 4 * t :][:4, g] for i in range(4)]
        words[lane, :8] = [int(np.ascontiguousarray(p).view(np.uint32)[0]) for p in parts]
        chosen = places[g + 8 * (t % 2), 8 * (t // 2) : 8 * (t // 2) + 8].reshape(16)
        words[lane, 8] = sum(int(index) << 2 * i for i, index in enumerate(chosen))
    return a.reshape(16, 64), b, words


def sparse_product(k: Frame) -> None:
    """One sparse product of the words of 32 lanes."""
    with launch([1], 32) as (_, tx):
        operands, sums = local(9, "uint32"), local(4, "int32")
        for i in range(9):
            put(operands, i, get(k["words"], tx * 9 + i))
        for i in range(4):
            put(sums, i, 0)
        call("iso_mma_sparse_s8u8", at(sums, 0), at(operands, 0), at(operands, 4), get(operands, 8))
        for i in range(4):
            put(k["c"], tx * 4 + i, get(sums, i))


def test_sparse_product_has_the_lanes_of_ptx(tmp_path: Path) -> None:
    a, b, words = sparse_operands(np.random.default_rng(1))
    tensors = [Tensor("words", (32, 9), "uint32"), Tensor("c", (32, 4), "int32")]
    c = run(tmp_path, tensors, sparse_product, {"words": words, "c": np.zeros((32, 4), np.int32)})
    product = a.astype(np.int32) @ b.astype(np.int32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        assert c[lane].tolist() == [product[r, 2 * t + i] for r in (g, g + 8) for i in range(2)]


def reversing(with_barrier: bool) -> Any:
    """A kernel that reverses a row through shared memory."""

    def emit(k: Frame) -> None:
        with launch([k.size("m")], 64) as ((row,), tx):
            line = shared(64)
            put(line, tx, get(k["x"], wide(row) * 64 + wide(tx)))
            if with_barrier:
                sync()
            put(k["y"], wide(row) * 64 + wide(tx), get(line, 63 - tx))

    return emit


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_missing_barrier_shows(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOFOLD_EMULATOR_ORDER", order)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    tensors = [Tensor("x", ("m", 64), "float32"), Tensor("y", ("m", 64), "float32")]
    right = run(tmp_path, tensors, reversing(True), {"x": x, "y": np.zeros_like(x)})
    assert np.array_equal(right, x[:, ::-1])
    wrong = run(tmp_path, tensors, reversing(False), {"x": x, "y": np.zeros_like(x)})
    assert not np.array_equal(wrong, x[:, ::-1])


@pytest.mark.parametrize("waits", [True, False])
def test_missing_wait_shows(waits: bool, tmp_path: Path) -> None:
    def emit(k: Frame) -> None:
        with launch([1], 32) as (_, tx):
            line = shared(128)
            call("iso_copy16", at(line, tx * 4), at(k["x"], tx * 4), 16)
            call("iso_copy_commit")
            if waits:
                call("iso_copy_wait", 0)
            put(k["y"], tx, get(line, tx * 4))

    x = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    tensors = [Tensor("x", (128,), "float32"), Tensor("y", (32,), "float32")]
    y = run(tmp_path, tensors, emit, {"x": x, "y": np.zeros(32, np.float32)})
    assert np.array_equal(y, x[::4]) == waits


def test_barrier_that_not_all_reach_ends_with_a_message(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        import numpy as np, tvm
        from isofold.runtimes.tvm.cuda.builder import Tensor, get, launch, prim_func, put, sync, when
        from isofold.runtimes.tvm.cuda.emulate import emulated

        def emit(k):
            with launch([1], 64) as (_, tx):
                with when(tx < 40):
                    sync()
                put(k["y"], tx, 1.0)

        function = prim_func("kernel", [Tensor("y", (64,), "float32")], emit)
        module = emulated({{"kernel": function}}, Path({str(tmp_path)!r}))
        module["kernel"](tvm.runtime.tensor(np.zeros(64, np.float32)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    assert "a barrier or warp operation that not all threads reach: 40 of 64 threads" in done.stderr
