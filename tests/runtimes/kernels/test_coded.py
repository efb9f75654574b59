"""Linears on coded weights agree with the decoder of the packed layout, for every format on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isofold.compiler.dialect import packing
from isofold.compiler.dialect.element_formats import FORMATS
from isofold.compiler.dialect.packing_coded import CodedMatrix, PackedCoded, pack_coded, unpack_coded
from isofold.runtimes.kernels.coded import ELEMENTS, SCALES
from isofold.runtimes.kernels.math import ACTIVATIONS

from .conftest import ISAS, Coded, FloatCall, Linear, address, guarded
from .reference import ACTIVATIONS as FUNCTIONS

TOLERANCE = 3e-6
"""Sums of up to a few thousand float32 products, relative to the sum of their absolute values."""

CASES = [(name, group) for name, form in FORMATS.items() for group in form.group_sizes]


def random_matrix(rng: np.random.Generator, n: int, k: int, name: str, group: int) -> CodedMatrix:
    """All finite codes and a wide range of scales."""
    form = FORMATS[name]
    table = torch.from_numpy(rng.standard_normal(16).astype(np.float32)) if name == "table4" else None
    finite = torch.nonzero(form.values(table).isfinite()).flatten()
    codes = finite[torch.from_numpy(rng.integers(0, len(finite), (n, k)))].to(torch.uint8)
    groups = -(-k // group) if group else 1
    if form.scale == "float":
        floats = torch.from_numpy(rng.uniform(1e-3, 1e-1, (n, groups)).astype(np.float32))
        scale = packing.storable_scale(floats, group)[0]
    else:
        low, high = (
            (110, 140) if form.scale == "e8m0" else (0, 0x7F)
        )  # E4M3: all but NaN, subnormals included
        scale = torch.from_numpy(rng.integers(low, high, (n, groups))).to(torch.uint8)
    return CodedMatrix(codes, scale, 0.037 if name == "nvfp4" else 1.0, table, name, group)


@dataclass
class Case:
    """A coded linear as the driver takes it, and its weight in float64."""

    packed: PackedCoded
    weight: Tensor
    linear: Coded
    bias: Tensor | None
    activation: str
    table: Tensor


def make(
    rng: np.random.Generator, n: int, k: int, name: str, group: int, activation: str, gated: bool, bias: bool
) -> Case:
    rows = 2 * packing.ceil_to(n, 16) if gated else n
    packed = pack_coded(random_matrix(rng, rows, k, name, group))
    form = FORMATS[name]
    weight = unpack_coded(
        packed.weight,
        packed.scale,
        packed.table,
        rows,
        k,
        name,
        group,
        packed.scale_multiplier,
        torch.float64,
    )
    vector = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if bias else None
    table = form.values(packed.table).float() if form.bits == 4 else torch.zeros(16)
    element = "table" if form.bits == 4 else name.rpartition("_")[2]
    mode = {"e8m0": "e8m0", "e4m3": "e4m3"}.get(form.scale, "g" if group else "pc")
    kp = packing.ceil_to(k, packing.alignment(group))
    linear = Linear(
        *map(address, (packed.weight, packed.scale, None, None, vector)),
        *(n, kp, 0, group, packed.scale_multiplier, ACTIVATIONS.index(activation), gated),
    )
    coded = Coded(linear, address(table), ELEMENTS.index(element), SCALES.index(mode))
    return Case(packed, weight, coded, vector, activation, table)


def run(
    library: ctypes.CDLL, isa: str, case: Case, x: np.ndarray, residual: np.ndarray | None, threads: int
) -> None:
    """Check one call of the driver, its tasks cut into ranges of which each runs on a thread of its own."""
    n, gated = case.linear.linear.n, case.linear.linear.gated
    m, k = x.shape
    y, intact = guarded((m, n), np.float32, np.nan)
    call = FloatCall(*map(address, (x, residual, y)), m, k)
    tasks = library.test_float_tasks(ctypes.byref(case.linear), ctypes.c_int64(m))
    cuts = [i * tasks // threads for i in range(threads + 1)]

    def piece(begin: int, end: int) -> None:
        bounds = (ctypes.c_int64(begin), ctypes.c_int64(end))
        library.test_coded_run(int(isa[1]), ctypes.byref(case.linear), ctypes.byref(call), *bounds)

    workers = [threading.Thread(target=piece, args=pair) for pair in itertools.pairwise(cuts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wide = torch.from_numpy(x).double()
    product, magnitude = wide @ case.weight.T, wide.abs() @ case.weight.abs().T
    if case.bias is not None:
        product, magnitude = product + case.bias.double(), magnitude + case.bias.double().abs()
    function = FUNCTIONS[case.activation]
    if gated:
        gate, up = (half.T for half in packing.split_gated(product.T.contiguous(), n))
        gate_size, up_size = (half.T for half in packing.split_gated(magnitude.T.contiguous(), n))
        expected = function(gate) * up
        magnitude = gate_size * up.abs() + up_size * gate.abs() + up.abs()
    else:
        expected = function(product)
    if residual is not None:
        expected = expected + torch.from_numpy(residual).double()
    error = ((torch.from_numpy(y).double() - expected).abs() / (magnitude + 1)).max().item()
    assert intact()
    assert error < TOLERANCE, f"{m=} {n=} {k=} {case.packed.format} {case.activation}: {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "group"), CASES)
def test_against_decoder(library: ctypes.CDLL, isa: str, name: str, group: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 16, 32), (1, 5, 7), (2, 33, 70), (3, 48, 128), (4, 40, 200), (5, 17, 130), (7, 31, 64)]
    sizes += [(13, 100, 300), (130, 37, 129), (6, 64, 2100)]
    for i, (m, n, k) in enumerate(sizes):
        case = make(rng, n, k, name, group, ACTIVATIONS[i % 5], i % 3 == 2, i % 2 == 0)
        x = rng.standard_normal((m, k)).astype(np.float32)
        residual = rng.standard_normal((m, n)).astype(np.float32) if i % 4 == 0 else None
        run(library, isa, case, x, residual, threads=1 + i % 8)


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    case=st.sampled_from(CASES),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    threads=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
def test_ragged_shapes(
    library: ctypes.CDLL, isa: str, case: tuple[str, int], m: int, n: int, k: int, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    made = make(rng, n, k, *case, "none", bool(seed % 2), bool(seed % 3))
    x = (rng.standard_normal((m, k)) * 10.0 ** rng.integers(-4, 5)).astype(np.float32)
    run(library, isa, made, x, None, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_decoded_exactly(library: ctypes.CDLL, isa: str, name: str) -> None:
    """A unit vector as activation picks one input: the output is that weight, bit for bit up to the scale."""
    form = FORMATS[name]
    group = form.group_sizes[0]
    table = torch.linspace(-2, 3, 16) if name == "table4" else None
    codes = torch.nonzero(form.values(table).isfinite()).flatten().to(torch.uint8)
    k = len(codes)
    matrix = torch.stack([codes, codes.flip(0), codes.roll(5)])
    one = {"float": torch.ones(1, 1), "e8m0": torch.tensor([[127]]), "e4m3": torch.tensor([[0x38]])}[
        form.scale
    ]
    scale = one.expand(3, -(-k // group) if group else 1).contiguous()
    scale = scale if form.scale == "float" else scale.to(torch.uint8)
    packed = pack_coded(CodedMatrix(matrix, scale, 1.0, table, name, group))
    values = form.values(table)[matrix.long()]
    rng = np.random.default_rng(0)
    case = make(rng, 3, k, name, group, "none", False, False)
    linear = Linear(
        *map(address, (packed.weight, packed.scale, None, None, None)),
        *(3, case.linear.linear.kp, 0, group, packed.scale_multiplier, 0, 0),
    )
    entries = form.values(table).float() if form.bits == 4 else torch.zeros(16)
    coded = Coded(linear, address(entries), case.linear.element, case.linear.scale)
    for rows in (1, k):  # decoded in registers, and as a chunk
        for first in range(0, k, rows):
            x = np.eye(k, dtype=np.float32)[first : first + rows]
            y = np.empty((rows, 3), np.float32)
            call = FloatCall(address(x), 0, address(y), rows, k)
            tasks = library.test_float_tasks(ctypes.byref(coded), ctypes.c_int64(rows))
            bounds = (ctypes.c_int64(0), ctypes.c_int64(tasks))
            library.test_coded_run(int(isa[1]), ctypes.byref(coded), ctypes.byref(call), *bounds)
            assert torch.equal(torch.from_numpy(y).double(), values.T[first : first + rows])
