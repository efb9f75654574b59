"""The host: what it refuses and how that reaches Python, kernels made once, threads, several callers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from isofold.runtimes.tvm.executor import Executor, aligned, ffi

NORM = "Norm in=1000 out=01 eps=f:0x1p-20 kind=s:rms node=s:norm"


def tensor(array: np.ndarray) -> Any:
    return ffi().from_dlpack(aligned(array))


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 2.0**-20)


def test_a_result_that_nothing_wants_is_left_out(host: Executor) -> None:
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    y = aligned(np.zeros_like(x))
    host.operator("isofold_op")(NORM, tensor(x), ffi().from_dlpack(y))
    np.testing.assert_allclose(y, norm(x), rtol=1e-5, atol=1e-6)


def test_the_library_says_what_it_is(host: Executor) -> None:
    assert "isofold_ops version=" in str(host.operator("isofold_info")())


@pytest.mark.parametrize(
    ("text", "tensors", "message"),
    [
        ("Nrom in=1000 out=01 eps=f:1 kind=s:rms", 2, "no operator of this name"),
        (
            "Norm in=1000 out=01 eps=f:1 kind=s:batch",
            2,
            "attribute 'kind' is 'batch'; expected one of layer, rms",
        ),
        ("Norm in=1000 out=01 kind=s:rms", 2, r"attribute 'eps' \(float\) is missing"),
        ("Norm in=1000 out=01 eps=f:1 kind=s:rms", 3, "number of tensors is not what the description says"),
        ("Norm in=1000 eps=f:1 kind=s:rms", 2, "malformed"),
        ("Norm what=ever", 2, "malformed"),
    ],
)
def test_bad_descriptions_are_errors(text: str, tensors: int, message: str, host: Executor) -> None:
    with pytest.raises(RuntimeError, match=message):
        host.operator("isofold_op")(text, *(tensor(np.ones((2, 8), np.float32)) for _ in range(tensors)))


def test_what_an_operator_refuses_is_an_error(host: Executor) -> None:
    call = host.operator("isofold_op")
    x, y = tensor(np.ones((2, 8), np.float32)), tensor(np.ones((2, 8), np.float32))
    with pytest.raises(
        RuntimeError, match=r"Norm: input 2 \(weight\): expected float32 \[8\], got float32 \[7\]"
    ):
        call(NORM.replace("in=1000", "in=1010"), x, tensor(np.ones(7, np.float32)), y)
    with pytest.raises(
        RuntimeError, match=r"Norm: result 1 has the shape \[2, 8\], the executable expects \[2, 9\]"
    ):
        call(NORM, x, tensor(np.ones((2, 9), np.float32)))
    with pytest.raises(RuntimeError, match="not a tensor"):
        call(NORM, x, 3)
    with pytest.raises(RuntimeError, match="must be a description"):
        call(x, y)


def test_many_threads_at_once(host: Executor) -> None:
    generator = np.random.default_rng(1)
    call = host.operator("isofold_op")
    inputs = [generator.normal(size=(64, 640)).astype(np.float32) for _ in range(4)]
    failures: list[str] = []

    def run(x: np.ndarray) -> None:
        y = aligned(np.zeros_like(x))
        for _ in range(50):
            y[...] = 0
            call(NORM, tensor(x), ffi().from_dlpack(y))
            if not np.allclose(y, norm(x), rtol=1e-4, atol=1e-5):
                failures.append("differs")

    threads = [threading.Thread(target=run, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_many_descriptions(host: Executor) -> None:
    """More kernels than the table of addresses has places."""
    x = np.random.default_rng(2).normal(size=(2, 16)).astype(np.float32)
    y = aligned(np.zeros_like(x))
    call, given, result = host.operator("isofold_op"), tensor(x), ffi().from_dlpack(y)
    for i in range(5000):
        call(NORM.replace("node=s:norm", f"node=s:norm{i % 4500}"), given, result)
    np.testing.assert_allclose(y, norm(x), rtol=1e-5, atol=1e-6)
