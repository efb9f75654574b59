"""Sparse linears agree with the dense product of the decoded matrix, in all layouts and on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from isofold.compiler.dialect.activation import activate
from isofold.compiler.dialect.packing import ceil_to, pack_groups, row_sums, split_gated, storable_scale
from isofold.compiler.dialect.sparse_layouts import HELD, LAYOUTS, VALUES
from isofold.compiler.dialect.sparse_packing import PackedSparse, pack_sparse
from isofold.runtimes.kernels.math import ACTIVATIONS

from .conftest import Linear, Sparse, SparseCall, address, guarded

TOLERANCE = 1e-6
"""A few float32 roundings, relative to the sum of the absolute values of the terms."""

VARIANTS = ("v3", "v4", "v4-plain")
"""Instruction sets; plain: without AVX512-VBMI2."""

FORMS = [
    *((layout, value, 0) for layout, values in HELD.items() for value in values),
    *((layout, "int4", group) for layout in ("bitmask", "panels") for group in (32, 64, 128)),
]
"""Layout, type of the values, group of inputs that share a scale (0: the row)."""

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
variants = pytest.mark.parametrize("variant", VARIANTS)


@dataclass
class Case:
    """A sparse matrix `[rows, K]` (codes with scales, or floats), and what follows the product."""

    form: tuple[str, str, int]
    matrix: Tensor
    packed: PackedSparse
    n: int
    scale: Tensor | None
    multiplier: float
    bias: Tensor | None
    activation: str
    gated: bool

    @property
    def quantized(self) -> bool:
        return self.scale is not None

    @property
    def weight(self) -> Tensor:
        """The decoded matrix in float64."""
        if self.scale is None:
            return self.matrix.double()
        group = self.form[2] or self.matrix.shape[1]
        return (
            self.matrix.double() * self.scale.double().repeat_interleave(group, 1)[:, : self.matrix.shape[1]]
        )


def patterned(rng: np.random.Generator, layout: str, n: int, k: int, density: float) -> Tensor:
    """Which entries may be other than zero: bool `[n, k]`."""
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        order = torch.from_numpy(rng.random((n, ceil_to(k, of) // of, of))).argsort(-1)
        keep = (order < some) & torch.from_numpy(rng.random(order.shape) < 2 * density)
        return keep.flatten(1)[:, :k]
    height, width = map(int, layout.split("x")) if "x" in layout else (1, 1)
    blocks = torch.from_numpy(
        rng.random((ceil_to(n, height) // height, ceil_to(k, width) // width)) < density
    )
    keep = blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k]
    if layout == "windows":
        keep[:, 255::256] = False  # a whole window is more than the layout holds
    return keep


def sparse_matrix(
    rng: np.random.Generator, form: tuple[str, str, int], n: int, k: int, density: float
) -> Tensor:
    layout, value, _ = form
    if value == "int8":
        values = torch.from_numpy(rng.choice(np.array([-127, -3, 1, 127, 55], np.int8), (n, k)))
    elif value == "int4":
        values = torch.from_numpy(rng.choice(np.array([-8, -3, 1, 7, 5], np.int8), (n, k)))
    else:
        values = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
        values = values.to(getattr(torch, value))
    return values * patterned(rng, layout, n, k, density)


def random_case(
    rng: np.random.Generator, form: tuple[str, str, int], n: int, k: int, density: float, *, bias: bool = False,
    activation: str = "none", gated: bool = False, matrix: Tensor | None = None,
) -> Case:  # fmt: skip
    rows = 2 * ceil_to(n, 16) if gated else n
    matrix = sparse_matrix(rng, form, rows, k, density) if matrix is None else matrix
    scale, multiplier = None, 1.0
    if form[1].startswith("int"):
        groups = ceil_to(k, form[2]) // form[2] if form[2] else 1
        drawn = torch.from_numpy(rng.uniform(0.001, 0.1, (rows, groups)).astype(np.float32))
        scale, multiplier = storable_scale(drawn, form[2])
    added = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if bias else None
    packed = pack_sparse(matrix, form[0], 4 if form[1] == "int4" else 8)
    return Case(form, matrix, packed, n, scale, multiplier, added, activation, gated)


def run(
    library: ctypes.CDLL, variant: str, case: Case, x: np.ndarray, params: np.ndarray | None,
    residual: np.ndarray | None, cuts: tuple[float, ...],
) -> np.ndarray:  # fmt: skip
    """Run the driver, tasks cut at the given fractions and run in reverse order; canaries around y are checked."""
    m, k, packed, group = x.shape[0], case.matrix.shape[1], case.packed, case.form[2]
    scale = wsum = None
    if case.scale is not None:
        kind = torch.float16 if group else torch.float32
        scale = pack_groups(case.scale / case.multiplier, k, group, kind)
        sums = row_sums(case.matrix, case.scale.double(), None, group).float()
        wsum = F.pad(sums, (0, ceil_to(len(sums), 16) - len(sums)))
    last = (ACTIVATIONS.index(case.activation), case.gated)
    ends = (case.n, ceil_to(k, 64), 8, group, case.multiplier)
    linear = Linear(0, *map(address, (scale, None, wsum, case.bias)), *ends, *last)
    number = int(variant[1])
    expands = variant == "v4" and bool(library.test_expands())
    tensors = (address(t) for t in (packed.places, packed.values, packed.offsets))
    kinds = (LAYOUTS.index(case.form[0]), VALUES.index(case.form[1]))
    sparse = Sparse(*tensors, k, ceil_to(len(case.matrix), 16), *kinds, expands, library.test_sparse_table())
    library.test_sparse_shape(ctypes.byref(sparse))
    y, intact = guarded((m, case.n), np.float32, np.nan)
    size = library.test_sparse_scratch(ctypes.byref(sparse), ctypes.c_int64(m))
    buffer = np.full(size + 128, 0xFF, np.uint8)  # NaN where nothing is written
    start = -address(buffer) % 64
    scratch = address(buffer) + start
    call = SparseCall(
        address(x), x.shape[1], address(params), address(residual), address(y), m,
        params is not None and params.shape[0] != m, scratch,
    )  # fmt: skip
    words = sparse.padded // 64
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
        u = np.full((m, ceil_to(k, 32)), 77, np.uint8)  # what is behind column k meets no weight
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
    assert error < TOLERANCE, f"{variant} {case.form} {case.n=} {k=} {m=}: {error:.2e}"


ROWS = (1, 2, 3, 4, 5, 7, 9, 16, 17, 33, 64, 65, 100, 130, 260)
SIZES = [
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
    (70, 513),
]


@variants
@forms
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_shapes(library: ctypes.CDLL, variant: str, form: tuple[str, str, int], density: float) -> None:
    rng = np.random.default_rng(int(density * 100))
    for i, (m, (n, k)) in enumerate(zip(ROWS, itertools.cycle(SIZES), strict=False)):
        case = random_case(rng, form, n, k, density, bias=i % 2 == 0, activation=ACTIVATIONS[i % 5])
        check(library, variant, case, m, rng, residual=i % 3 == 0, static=i % 4 == 0, cuts=(0.3, 0.7))


@variants
@forms
@pytest.mark.parametrize("m", [1, 6, 70])
def test_gated(library: ctypes.CDLL, variant: str, form: tuple[str, str, int], m: int) -> None:
    rng = np.random.default_rng(m)
    for n, k, activation in ((5, 40, "silu"), (32, 64, "gelu"), (50, 129, "none")):
        case = random_case(rng, form, n, k, 0.3, bias=True, activation=activation, gated=True)
        check(library, variant, case, m, rng, residual=n == 32)


@variants
@forms
def test_extreme_values_and_uneven_rows(
    library: ctypes.CDLL, variant: str, form: tuple[str, str, int]
) -> None:
    """Largest codes and activations everywhere; rows that are full next to rows that are empty; more inputs than are
    unpacked at a time."""
    rng = np.random.default_rng(1)
    for m, k in ((1, 520), (3, 520), (18, 520), (70, 520), (2, 4500), (20, 4500)):
        matrix = sparse_matrix(rng, form, 40, k, 1.0)
        if form[1].startswith("int"):
            matrix[matrix != 0] = 127 if form[1] == "int8" else -8
        matrix[16:32] = 0
        matrix[:, 100:190] = 0
        check(library, variant, random_case(rng, form, 40, k, 1.0, matrix=matrix), m, rng, extreme=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70), k=st.integers(1, 400), m=st.integers(1, 90), density=st.floats(0, 1),
    form=st.sampled_from(FORMS), variant=st.sampled_from(VARIANTS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(
    library: ctypes.CDLL,
    n: int,
    k: int,
    m: int,
    density: float,
    form: tuple[str, str, int],
    variant: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, form, n, k, density, bias=seed % 2 == 0)
    check(library, variant, case, m, rng)


@pytest.mark.parametrize("rows", [1, 16, 48, 64])
def test_rows_in_the_order_of_their_lengths(
    library: ctypes.CDLL, kernel: Callable[..., None], rows: int
) -> None:
    """Every row once, short ones first, and none that is not there."""
    if not library.test_expands():
        pytest.skip("needs AVX512-VBMI2")
    rng = np.random.default_rng(rows)
    for most in (1, 5, 254):
        counts = rng.integers(0, most + 1, 64) * 4
        order, intact = guarded((2 * 64,), np.uint8, 99)
        kernel("v4", "sparse_order", counts, rows, order)
        assert sorted(order[:rows]) == list(range(rows))
        assert (np.diff(counts[order[:rows]]) >= 0).all()
        assert intact()
