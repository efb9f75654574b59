"""SparseLinear and SparseLinearFloat: threads, instruction sets, several sessions, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.dialect.packing import pack_linear
from isofold.compiler.dialect.sparse_packing import pack_sparse

Check = Callable[..., None]
WEIGHTS = ("mask", "values", "offsets", "scale", "wsum", "bias")


def sparse_arguments(rows: int, n: int, k: int, density: float, quantized: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(rows)
    there = torch.rand(n, k, generator=generator) < density
    x = torch.randn(rows, k, generator=generator)
    bias, residual = torch.randn(n, generator=generator), torch.randn(rows, n, generator=generator)
    tail = [bias, residual, n, k, "gelu", False]
    if not quantized:
        p = pack_sparse(torch.randn(n, k, generator=generator) * there)
        return [x, p.mask, p.values, p.offsets, *tail]
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8) * there
    dense = pack_linear(codes, torch.rand(n, 1, generator=generator) * 0.02, None, 8, 0)
    p = pack_sparse(codes)
    u, params = OPERATORS["quantize_activation"].reference(x, None, 32)
    return [u, params, p.mask, p.values, p.offsets, dense.scale, dense.wsum, *tail]


def name_of(quantized: bool) -> str:
    return "linear_sparse" if quantized else "linear_sparse_float"


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_threads(check: Check, quantized: bool, threads: int, rows: int) -> None:
    arguments = sparse_arguments(rows, 300, 1100, 0.2, quantized)
    check(name_of(quantized), arguments, constants=WEIGHTS, threads=threads)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_no_rows_and_a_wider_input(
    run_operator: Callable[..., list[Tensor]], check: Check, quantized: bool
) -> None:
    none = sparse_arguments(0, 48, 64, 0.5, quantized)
    assert run_operator(name_of(quantized), none, constants=WEIGHTS)[0].shape == (0, 48)
    if quantized:
        arguments = sparse_arguments(3, 40, 100, 0.3, quantized)
        arguments[0] = torch.nn.functional.pad(arguments[0], (0, 64))
        check("linear_sparse", arguments, constants=WEIGHTS)


def test_several_sessions_at_once(check: Check) -> None:
    failures: list[BaseException] = []

    def work(quantized: bool) -> None:
        try:
            arguments = sparse_arguments(20, 100, 300, 0.2, quantized)
            for _ in range(3):
                check(name_of(quantized), arguments, constants=WEIGHTS, threads=2)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: lambda t: t[:, :8]}, r"mask.*expected uint8 \[48, 16\], got uint8 \[48, 8\]"),
        ({2: lambda t: t[:64]}, r"values.*16 more than the last offset"),
        ({3: lambda t: t[:-1]}, r"offsets.*expected int32 \[49\], got int32 \[48\]"),
        ({0: lambda t: t[:, :100]}, r"x.*100"),
    ],
)
def test_wrong_inputs_are_named(
    run_operator: Callable[..., list[Tensor]], changed: dict[int, Callable[[Tensor], Tensor]], message: str
) -> None:
    arguments = sparse_arguments(2, 40, 128, 0.5, False)
    for position, change in changed.items():
        arguments[position] = change(arguments[position]).contiguous()
    with pytest.raises(Exception, match=message):
        run_operator("linear_sparse_float", arguments)


def test_the_other_instruction_set() -> None:
    """v3 forced, in a process of its own: the choice is made when the library is loaded."""
    selected = f"{__file__}::test_threads"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", selected]
    done = subprocess.run(command, env={**os.environ, "ISOFOLD_ISA": "v3"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "18 passed" in done.stdout
