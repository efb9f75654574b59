"""Packed linears on float activations agree with the packed weights' decoder, on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

from isofold.runtimes.kernels.math import ACTIVATIONS

from .conftest import ISAS, FloatCall, Linear, address, guarded
from .reference import FORMATS, random_case

TOLERANCE = 3e-6
"""Sums of up to a few thousand float32 products, relative to the sum of their absolute values."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_against_decoder(library: ctypes.CDLL, isa: str, bits: int, group_size: int, zero: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 16, 32), (1, 5, 7), (2, 33, 70), (3, 48, 128), (4, 40, 200), (5, 17, 130), (7, 31, 64)]
    sizes += [(13, 100, 300), (130, 37, 129), (6, 64, 4200)]
    for i, (m, n, k) in enumerate(sizes):
        activation, gated = ACTIVATIONS[i % 5], i % 3 == 2
        case = random_case(
            rng, n, k, bits, group_size, zero=zero, bias=i % 2 == 0, activation=activation, gated=gated
        )
        packed = case.packed
        pointers = map(address, (packed.weight, packed.scale, packed.zero, None, case.bias))
        sizes_of = (n, case.kp, bits, group_size, packed.scale_multiplier)
        linear = Linear(*pointers, *sizes_of, ACTIVATIONS.index(activation), gated)
        x = rng.standard_normal((m, k)).astype(np.float32)
        residual = rng.standard_normal((m, n)).astype(np.float32) if i % 4 == 0 else None
        y, intact = guarded((m, n), np.float32, np.nan)
        call = FloatCall(*map(address, (x, residual, y)), m, k)
        tasks = library.test_float_tasks(ctypes.byref(linear), ctypes.c_int64(m))
        for begin, end in itertools.pairwise((0, tasks // 3, tasks)):
            arguments = (ctypes.c_int64(begin), ctypes.c_int64(end))
            library.test_float_run(int(isa[1]), ctypes.byref(linear), ctypes.byref(call), *arguments)
        wide = torch.from_numpy(x).double()
        # the centred codes are what is rounded: w and zero are exact in float32
        magnitude = wide.abs() @ case.weight.abs().T
        expected, scale = case.finish(wide @ case.weight.T, magnitude, residual)
        error = ((torch.from_numpy(y).double() - expected).abs() / scale).max().item()
        assert intact()
        assert error < TOLERANCE, f"{m=} {n=} {k=} {activation}: {error:.2e}"
