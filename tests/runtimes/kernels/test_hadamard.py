"""The Hadamard kernels compute the transform, for both instruction sets, and write nothing else."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from isofold.compiler.hadamard import apply_hadamard
from isofold.compiler.hadamard_orders import CORES, signs

from .conftest import ISAS, address, guarded


class Plan(ctypes.Structure):
    """struct isofold_hadamard."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("cores", ctypes.c_int64),
        ("order", ctypes.c_int64 * 8),
        ("matrix", ctypes.c_void_p * 8),
        ("scale", ctypes.c_float),
    ]


def expanded(library: ctypes.CDLL, order: int, transpose: bool) -> np.ndarray:
    matrix = np.full((order, -(-order // 16) * 16), 7, np.float32)
    position = library.test_core(ctypes.c_int64(order))
    library.test_expand(position, int(transpose), ctypes.c_void_p(address(matrix)))
    return matrix


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "orders",
    [(), (2,), (4,), (8,), (16,), (32,), (64,), (128,), (256,), (512,), (4096,), (8192,), (12,), (20,), (12, 2),
     (20, 4), (12, 8), (12, 16), (28, 32), (36, 64), (12, 128), (92, 64), (44, 12, 2), (12, 28, 8)],
)  # fmt: skip
def test_transform(library: ctypes.CDLL, isa: str, orders: tuple[int, ...]) -> None:
    size, blocks = math.prod(orders), 3
    cores = [order for order in orders if order in CORES]
    x = np.random.default_rng(size).standard_normal((blocks, size)).astype(np.float32)
    for transpose in (False, True):
        matrices = [expanded(library, order, transpose) for order in cores]
        plan = Plan(size, size // math.prod(cores), len(cores), scale=size**-0.5)
        for i, (order, matrix) in enumerate(zip(cores, matrices, strict=True)):
            plan.order[i], plan.matrix[i] = order, address(matrix)
        y, intact = guarded((blocks, size), np.float32)
        scratch, scratch_intact = guarded((size,), np.float32)
        pointers = [ctypes.c_void_p(address(a)) for a in (x, y)]
        library.test_hadamard(
            int(isa[1]),
            ctypes.byref(plan),
            *pointers,
            ctypes.c_int64(blocks),
            ctypes.c_void_p(address(scratch)),
        )
        assert intact()
        assert scratch_intact()
        expected = apply_hadamard(torch.from_numpy(x).double(), orders, transpose).numpy()
        assert np.abs(y - expected).max() <= 3e-6 * np.abs(expected).max()


def test_the_tables_are_the_compilers_matrices(library: ctypes.CDLL) -> None:
    for order in CORES:
        for transpose in (False, True):
            matrix = expanded(library, order, transpose)
            wanted = signs(order).T if transpose else signs(order)
            assert np.array_equal(matrix[:, :order], wanted)
            assert not matrix[:, order:].any()
    for order in (1, 2, 16, 188):
        assert library.test_core(ctypes.c_int64(order)) == -1
