"""Packed linears on quantized activations agree with the packed weights' decoder, on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect.packing import unpack_codes
from isofold.runtimes.kernels.math import ACTIVATIONS

from .conftest import ISAS, Call, Linear, address, guarded
from .reference import FORMATS, Case, random_case

TOLERANCE = 3e-7
"""A few float32 roundings, relative to the sum of the absolute values of the terms."""


def run(
    library: ctypes.CDLL,
    isa: str,
    case: Case,
    u: np.ndarray,
    params: np.ndarray,
    residual: np.ndarray | None = None,
    cuts: tuple[float, ...] = (),
) -> np.ndarray:
    """Run the driver, tasks cut at the given fractions and run in reverse order; canaries around y are checked."""
    m = u.shape[0]
    packed = case.packed
    tensors = (packed.weight, packed.scale, packed.zero, packed.wsum, case.bias)
    gate = (case.n, case.kp, case.bits, case.group_size, packed.scale_multiplier)
    linear = Linear(*map(address, tensors), *gate, ACTIVATIONS.index(case.activation), case.gated)
    y, intact = guarded((m, case.n), np.float32, np.nan)
    size = library.test_scratch(ctypes.byref(linear), ctypes.c_int64(m))
    scratch = np.zeros(size + 64, np.uint8)
    call = Call(
        *map(address, (u, params, residual, y)),
        m,
        params.shape[0] != m or m == 1,
        address(scratch) if size else 0,
    )
    number = int(isa[1])
    tasks = library.test_tasks(ctypes.byref(linear), ctypes.c_int64(m))

    def ranges(function: Callable[..., Any], total: int) -> None:
        edges = [0, *sorted(int(c * total) for c in cuts), total]
        for begin, end in reversed(list(itertools.pairwise(edges))):
            function(
                number, ctypes.byref(linear), ctypes.byref(call), ctypes.c_int64(begin), ctypes.c_int64(end)
            )

    if size:
        ranges(library.test_prepare, m)
    ranges(library.test_run, tasks)
    assert intact()
    return y


def check(
    library: ctypes.CDLL,
    isa: str,
    case: Case,
    m: int,
    rng: np.random.Generator,
    *,
    residual: bool = False,
    static: bool = False,
    extreme: bool = False,
    cuts: tuple[float, ...] = (),
) -> None:
    u = np.zeros((m, case.kp), np.uint8)
    u[:, : case.k] = 255 if extreme else rng.integers(0, 256, (m, case.k))
    rows = 1 if static else m
    params = np.stack([rng.uniform(0.005, 0.05, rows), rng.integers(0, 256, rows)], 1).astype(np.float32)
    added = rng.standard_normal((m, case.n)).astype(np.float32) if residual else None
    y = run(library, isa, case, u, params, added, cuts)
    s, z = torch.from_numpy(params).double().split(1, 1)
    codes = torch.from_numpy(u[:, : case.k]).double()
    magnitude = s * (codes @ case.weight.abs().T) + s * z * case.weight.sum(1).abs()
    expected, scale = case.finish((s * (codes - z)) @ case.weight.T, magnitude, added)
    error = ((torch.from_numpy(y).double() - expected).abs() / scale).max().item()
    assert error < TOLERANCE, f"{isa} {case.n=} {case.k=} {m=}: {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_shapes(library: ctypes.CDLL, isa: str, bits: int, group_size: int, zero: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 16, 32), (1, 5, 7), (2, 33, 70), (3, 48, 128), (4, 40, 200), (5, 17, 130), (8, 31, 64)]
    # 70 rows and 16 blocks of panels: int4 is unpacked to scratch, in two chunks of K
    sizes += [(13, 100, 300), (130, 37, 129), (7, 64, 4200), (70, 500, 4200)]
    for i, (m, n, k) in enumerate(sizes):
        case = random_case(
            rng, n, k, bits, group_size, zero=zero, bias=i % 2 == 0, activation=ACTIVATIONS[i % 5]
        )
        check(library, isa, case, m, rng, residual=i % 3 == 0, static=i % 4 == 0, cuts=(0.3, 0.7))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (8, 128), (4, 0), (4, 32), (3, 64), (2, 32)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(library: ctypes.CDLL, isa: str, bits: int, group_size: int, activation: str) -> None:
    rng = np.random.default_rng(1)
    for m, n, k, zero in ((1, 16, 64, False), (3, 23, 96, True), (9, 40, 130, False)):
        case = random_case(
            rng, n, k, bits, group_size, zero=zero, activation=activation, gated=True, bias=m != 3
        )
        check(library, isa, case, m, rng, residual=m == 9, cuts=(0.5,))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_no_saturation_at_the_extremes(
    library: ctypes.CDLL, isa: str, bits: int, zero: bool, group_size: int
) -> None:
    """All activations 255 and all codes at the ends: vpmaddubsw on int8 weights would saturate here."""
    rng = np.random.default_rng(2)
    for m in (1, 4, 11):
        case = random_case(rng, 32, 512, bits, group_size, zero=zero, extreme=True)
        check(library, isa, case, m, rng, extreme=True)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    isa=st.sampled_from(ISAS),
    form=st.sampled_from([f for f in FORMATS if f[0] < 4]),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    flags=st.tuples(*[st.booleans()] * 6),
    seed=st.integers(0, 1000),
)
def test_few_bits_at_any_shape(
    library: ctypes.CDLL,
    isa: str,
    form: tuple[int, int],
    m: int,
    n: int,
    k: int,
    flags: tuple[bool, ...],
    seed: int,
) -> None:
    zero, gated, bias, residual, static, extreme = flags
    rng = np.random.default_rng(seed)
    activation = ACTIVATIONS[seed % 5]
    case = random_case(
        rng, n, k, *form, zero=zero, activation=activation, gated=gated, bias=bias, extreme=extreme
    )
    check(library, isa, case, m, rng, residual=residual, static=static, extreme=extreme, cuts=(0.4,))


@pytest.mark.parametrize("isa", ISAS)
def test_integer_part_is_exact(library: ctypes.CDLL, isa: str) -> None:
    """With scale 1 and zero point 0 the output is the integer product, bit for bit, up to 2**24."""
    rng = np.random.default_rng(3)
    for bits, k in ((8, 512), (4, 4096 + 96)):
        case = random_case(rng, 48, k, bits, 0)
        case.packed.scale.fill_(1.0)
        case.packed.wsum.zero_()
        codes = torch.from_numpy(rng.integers(0, 256, (10, k), dtype=np.uint8))
        u = np.zeros((10, case.kp), np.uint8)
        u[:, :k] = codes.numpy()
        y = run(library, isa, case, u, np.array([[1.0, 0.0]] * 10, np.float32))
        w = unpack_codes(case.packed.weight, 48, k, bits)
        assert np.array_equal(y, (codes.long() @ w.long().T).numpy().astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_result_does_not_depend_on_the_split(library: ctypes.CDLL, isa: str) -> None:
    rng = np.random.default_rng(4)
    case = random_case(rng, 150, 256, 4, 32, activation="gelu", bias=True)
    u = rng.integers(0, 256, (140, case.kp), dtype=np.uint8)
    params = np.stack([rng.uniform(0.005, 0.05, 140), rng.integers(0, 256, 140)], 1).astype(np.float32)
    whole = run(library, isa, case, u, params)
    for cuts in ((0.5,), (0.1, 0.2, 0.9), tuple(i / 10 for i in range(1, 10))):
        assert np.array_equal(whole, run(library, isa, case, u, params, cuts=cuts))
