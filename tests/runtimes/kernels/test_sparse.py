"""Sparse linears agree with the dense product of the decoded matrix, on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from isofold.compiler.dialect.activation import activate
from isofold.compiler.dialect.packing import ceil_to, pack_groups, row_sums, split_gated
from isofold.compiler.dialect.sparse_packing import PackedSparse, pack_sparse
from isofold.runtimes.kernels.math import ACTIVATIONS

from .conftest import Linear, Sparse, SparseCall, address, guarded

TOLERANCE = 1e-6
"""A few float32 roundings, relative to the sum of the absolute values of the terms."""

VARIANTS = ("v3", "v4", "v4-plain")
"""Instruction sets; plain: without AVX512-VBMI2."""


@dataclass
class Case:
    """A sparse matrix `[rows, K]` (codes with a scale a row, or floats), and what follows the product."""

    matrix: Tensor
    packed: PackedSparse
    n: int
    scale: Tensor | None
    bias: Tensor | None
    activation: str
    gated: bool

    @property
    def weight(self) -> Tensor:
        """The decoded matrix in float64."""
        weight = self.matrix.double()
        return weight if self.scale is None else weight * self.scale.double()


def sparse_matrix(rng: np.random.Generator, n: int, k: int, density: float, quantized: bool) -> Tensor:
    if quantized:
        values = rng.choice(np.array([-127, -3, 1, 127, 55], np.int8), (n, k))
    else:
        values = rng.standard_normal((n, k)).astype(np.float32)
    values[rng.random((n, k)) >= density] = 0
    return torch.from_numpy(values)


def random_case(
    rng: np.random.Generator, n: int, k: int, density: float, quantized: bool, *, bias: bool = False,
    activation: str = "none", gated: bool = False,
) -> Case:  # fmt: skip
    rows = 2 * ceil_to(n, 16) if gated else n
    matrix = sparse_matrix(rng, rows, k, density, quantized)
    scale = torch.from_numpy(rng.uniform(0.001, 0.1, (rows, 1)).astype(np.float32)) if quantized else None
    added = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if bias else None
    return Case(matrix, pack_sparse(matrix), n, scale, added, activation, gated)


def run(
    library: ctypes.CDLL, variant: str, case: Case, x: np.ndarray, params: np.ndarray | None,
    residual: np.ndarray | None, cuts: tuple[float, ...],
) -> np.ndarray:  # fmt: skip
    """Run the driver, tasks cut at the given fractions and run in reverse order; canaries around y are checked."""
    m, k, packed = x.shape[0], case.matrix.shape[1], case.packed
    scale = wsum = None
    if case.scale is not None:
        scale = pack_groups(case.scale, k, 0, torch.float32)
        sums = row_sums(case.matrix, case.scale.double(), None, 0).float()
        wsum = torch.nn.functional.pad(sums, (0, ceil_to(len(sums), 16) - len(sums)))
    last = (ACTIVATIONS.index(case.activation), case.gated)
    linear = Linear(
        0, *map(address, (scale, None, wsum, case.bias)), case.n, ceil_to(k, 64), 8, 0, 1.0, *last
    )
    number = int(variant[1])
    expands = variant == "v4" and bool(library.test_expands())
    tensors = (address(t) for t in (packed.mask, packed.values, packed.offsets))
    table = library.test_sparse_table()
    sparse = Sparse(*tensors, ceil_to(k, 64) // 64, k, case.scale is not None, expands, table)
    y, intact = guarded((m, case.n), np.float32, np.nan)
    size = library.test_sparse_scratch(ctypes.byref(sparse), ctypes.c_int64(m))
    buffer = np.full(size + 128, 0xFF, np.uint8)  # NaN where nothing is written
    start = -address(buffer) % 64
    scratch = address(buffer) + start
    call = SparseCall(
        address(x), x.shape[1], address(params), address(residual), address(y), m,
        params is not None and params.shape[0] != m, scratch,
    )  # fmt: skip
    words = sparse.words
    for begin, end in ((words // 2, words), (0, words // 2)):
        pair = (ctypes.c_int64(begin), ctypes.c_int64(end))
        library.test_sparse_prepare(number, ctypes.byref(sparse), ctypes.byref(call), *pair)
    tasks = library.test_sparse_tasks(ctypes.byref(linear))
    edges = [0, *sorted(int(c * tasks) for c in cuts), tasks]
    for begin, end in reversed(list(itertools.pairwise(edges))):
        pair = (ctypes.c_int64(begin), ctypes.c_int64(end))
        library.test_sparse_run(number, *map(ctypes.byref, (linear, sparse, call)), *pair)
    assert intact()
    assert (buffer[start + size :] == 0xFF).all()
    return y


def check(
    library: ctypes.CDLL, variant: str, case: Case, m: int, rng: np.random.Generator, *,
    residual: bool = False, static: bool = False, extreme: bool = False, cuts: tuple[float, ...] = (),
) -> None:  # fmt: skip
    k = case.matrix.shape[1]
    added = rng.standard_normal((m, case.n)).astype(np.float32) if residual else None
    if case.scale is None:
        x = rng.standard_normal((m, k)).astype(np.float32)
        if extreme:
            x *= 1e18
        y = run(library, variant, case, x, None, added, cuts)
        inputs = torch.from_numpy(x).double()
        magnitude = inputs.abs() @ case.weight.abs().T
    else:
        u = np.zeros((m, ceil_to(k, 32)), np.uint8)
        u[:, :k] = 255 if extreme else rng.integers(0, 256, (m, k))
        rows = 1 if static else m
        params = np.stack([rng.uniform(0.005, 0.05, rows), rng.integers(0, 256, rows)], 1).astype(np.float32)
        y = run(library, variant, case, u, params, added, cuts)
        s, z = torch.from_numpy(params).double().split(1, 1)
        codes = torch.from_numpy(u[:, :k]).double()
        inputs = s * (codes - z)
        magnitude = s * (codes @ case.weight.abs().T) + s * z * case.weight.sum(1).abs()
    expected = inputs @ case.weight.T
    if case.bias is not None:
        expected = expected + case.bias.double()
        magnitude = magnitude + case.bias.double().abs()
    if case.gated:
        gate, up = split_gated(expected.T, case.n)
        big_gate, big_up = split_gated(magnitude.T, case.n)
        expected = (activate(gate, case.activation) * up).T
        magnitude = (big_gate * big_up + big_gate + big_up).T
    else:
        expected = activate(expected, case.activation)
    if added is not None:
        expected = expected + torch.from_numpy(added).double()
        magnitude = magnitude + torch.from_numpy(added).double().abs()
    error = ((torch.from_numpy(y).double() - expected).abs() / (magnitude + 1)).max().item()
    assert error < TOLERANCE, f"{variant} {case.n=} {k=} {m=}: {error:.2e}"


ROWS = (1, 2, 3, 4, 5, 7, 9, 16, 17, 33, 64, 65, 100, 130)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_shapes(library: ctypes.CDLL, variant: str, quantized: bool, density: float) -> None:
    rng = np.random.default_rng(int(density * 100))
    sizes = [
        (1, 1),
        (5, 7),
        (16, 64),
        (33, 70),
        (48, 128),
        (40, 200),
        (17, 130),
        (31, 63),
        (100, 300),
        (37, 960),
    ]
    for i, (m, (n, k)) in enumerate(zip(ROWS, itertools.cycle(sizes), strict=False)):
        case = random_case(rng, n, k, density, quantized, bias=i % 2 == 0, activation=ACTIVATIONS[i % 5])
        check(library, variant, case, m, rng, residual=i % 3 == 0, static=i % 4 == 0, cuts=(0.3, 0.7))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("m", [1, 6, 20, 70])
def test_gated(library: ctypes.CDLL, variant: str, quantized: bool, m: int) -> None:
    rng = np.random.default_rng(m)
    for n, k, activation in ((5, 40, "silu"), (32, 64, "gelu"), (50, 129, "none")):
        case = random_case(rng, n, k, 0.3, quantized, bias=True, activation=activation, gated=True)
        check(library, variant, case, m, rng, residual=n == 32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_extreme_values_and_uneven_rows(library: ctypes.CDLL, variant: str, quantized: bool) -> None:
    """Largest codes and activations everywhere; rows that are full next to rows that are empty."""
    rng = np.random.default_rng(1)
    for m in (1, 3, 18, 70):
        case = random_case(rng, 40, 520, 1.0, quantized)
        matrix = case.matrix.clone()
        if quantized:
            matrix[matrix != 0] = 127
        matrix[::3] = 0
        matrix[:, 100:190] = 0
        case = Case(matrix, pack_sparse(matrix), 40, case.scale, None, "none", False)
        check(library, variant, case, m, rng, extreme=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70), k=st.integers(1, 400), m=st.integers(1, 90), density=st.floats(0, 1),
    quantized=st.booleans(), variant=st.sampled_from(VARIANTS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    library: ctypes.CDLL, n: int, k: int, m: int, density: float, quantized: bool, variant: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, n, k, density, quantized, bias=seed % 2 == 0)
    check(library, variant, case, m, rng)
