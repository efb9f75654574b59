"""Dense float32 linears agree with a float64 product for ragged M, N and K, on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from isofold.compiler.dialect.dense_packing import pack_dense, unpack_dense
from isofold.runtimes.kernels.codegen import ISAS as INSTRUCTION_SETS
from isofold.runtimes.kernels.knobs import DEFAULTS
from isofold.runtimes.kernels.math import ACTIVATIONS

from .conftest import ISAS, FloatCall, Linear, address, guarded
from .reference import Case

TOLERANCE = 3e-6
"""Sums of up to a few thousand float32 products, relative to the sum of their absolute values."""

MOST = max(DEFAULTS.resolve("linear_dense", "dense_rows", isa.name) for isa in INSTRUCTION_SETS)
SIZES = [(m, 33, 70) for m in range(1, 2 * MOST + 2)] + [
    (1, 16, 1), (3, 1, 3), (2, 48, 256), (5, 5, 257), (7, 64, 511), (130, 37, 129), (300, 100, 300), (1, 17, 4099),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_against_float64(library: ctypes.CDLL, isa: str) -> None:
    rng = np.random.default_rng(0)
    for i, (m, n, k) in enumerate(SIZES):
        activation, gated = ACTIVATIONS[i % 5], i % 3 == 2
        rows = -(-n // 16) * 32 if gated else n
        weight = torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32))
        bias = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if i % 2 == 0 else None
        packed = pack_dense(weight)
        case = Case(n, k, 32, 0, activation, gated, None, weight.double(), bias)  # type: ignore[arg-type]
        pointers = map(address, (packed, None, None, None, bias))
        linear = Linear(*pointers, n, k, 32, 0, 1.0, ACTIVATIONS.index(activation), gated)
        x = rng.standard_normal((m, k)).astype(np.float32)
        residual = rng.standard_normal((m, n)).astype(np.float32) if i % 4 < 2 else None
        y, intact = guarded((m, n), np.float32, np.nan)
        call = FloatCall(*map(address, (x, residual, y)), m, k)
        tasks = library.test_dense_tasks(ctypes.byref(linear), ctypes.c_int64(m))
        for begin, end in itertools.pairwise((0, tasks // 3, tasks)):
            arguments = (ctypes.c_int64(begin), ctypes.c_int64(end))
            library.test_dense_run(int(isa[1]), ctypes.byref(linear), ctypes.byref(call), *arguments)
        wide = torch.from_numpy(x).double()
        expected, scale = case.finish(wide @ case.weight.T, wide.abs() @ case.weight.abs().T, residual)
        error = ((torch.from_numpy(y).double() - expected).abs() / scale).max().item()
        assert intact()
        assert error < TOLERANCE, f"{m=} {n=} {k=} {activation} {gated=}: {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 4, 13])
def test_a_right_side_with_rows_of_any_length(kernel: Callable[..., None], isa: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, 45)), rng.standard_normal((45, 70))
    x, w = x.astype(np.float32), w.astype(np.float32)
    before = rng.standard_normal((rows, 32)).astype(np.float32)
    for accumulate in (0, 1):
        t, intact = guarded((rows, 32), np.float32)
        t[:] = before
        kernel(isa, "dense_block", x, 45, w[:, 3:35].copy(), 32, 45, w, t, rows, accumulate)
        inside, intact_too = guarded((rows, 32), np.float32)
        inside[:] = before
        shifted = np.ascontiguousarray(w.reshape(-1)[3:])
        kernel(isa, "dense_block", x, 45, shifted, 70, 45, w, inside, rows, accumulate)
        expected = x.astype(np.float64) @ w[:, 3:35] + accumulate * before
        assert intact()
        assert intact_too()
        assert np.array_equal(t, inside)
        assert np.abs(t - expected).max() < 1e-4


def test_layout() -> None:
    for rows, k in ((1, 1), (32, 3), (37, 5), (64, 7)):
        weight = torch.arange(rows * k, dtype=torch.float32).reshape(rows, k) + 1
        packed = pack_dense(weight)
        assert packed.shape == (-(-rows // 32), k, 32)
        assert packed.is_contiguous()
        for b, c, j in itertools.product(*map(range, packed.shape)):
            row = 32 * b + j
            assert packed[b, c, j] == (weight[row, c] if row < rows else 0)
        assert torch.equal(unpack_dense(packed, rows), weight)
