"""Linears on additive codebooks agree with the decoder of the packed layout, on both instruction sets."""

from __future__ import annotations

import ctypes
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect import packing
from isofold.compiler.dialect.packing_codebook import CodebookMatrix, pack_codebook, unpack_codebook

from .conftest import ISAS, Codebook, FloatCall, Linear, address, guarded

TOLERANCE = 3e-6
"""Sums of up to a few thousand float32 products, relative to the sum of their absolute values."""
OUTLIER = 1e-5
"""The same for looked up products where one activation takes most bits of the fixed point."""
LAYOUTS = [(1, 16), (2, 16), (1, 8), (2, 8), (3, 8), (8, 8)]


def check(
    library: ctypes.CDLL,
    isa: str,
    layout: tuple[int, int],
    m: int,
    n: int,
    k: int,
    threads: int,
    seed: int,
    *,
    look_up: bool = False,
    size: float = 1.0,
) -> None:
    rng = np.random.default_rng(seed)
    count, bits = layout
    groups = -(-k // 8)
    dtype = torch.uint8 if bits == 8 else torch.uint16
    codes = torch.from_numpy(rng.integers(0, 2**bits, (n, groups, count)).astype(np.int32)).to(dtype)
    books = torch.from_numpy(rng.standard_normal((count, 2**bits, 8), dtype=np.float32)).half().float()
    scale = torch.from_numpy(rng.uniform(0.01, 1, n).astype(np.float32))
    packed = pack_codebook(CodebookMatrix(codes, books, scale, k))
    weight = unpack_codebook(packed.weight, packed.codebooks, packed.scale, n, k, torch.float64)
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32)) if seed % 2 else None
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[:, k // 2] *= size
    y, intact = guarded((m, n), np.float32, np.nan)
    kp = packing.ceil_to(k, 32)
    linear = Linear(*map(address, (packed.weight, packed.scale, None, None, bias)), n, kp, 0, 0, 1.0, 0, 0)
    made = Codebook(linear, address(packed.codebooks), count, bits)
    expanded = np.empty((count, 256, 8), np.float32)
    if bits == 8:
        library.test_codebook_expand(
            int(isa[1]),
            ctypes.byref(made),
            ctypes.c_void_p(address(packed.codebooks)),
            ctypes.c_void_p(address(expanded)),
        )
        assert np.array_equal(expanded, books.numpy())
        made.books = address(expanded)
    call = FloatCall(address(x), 0, address(y), m, k)
    if look_up:
        scratch = aligned(library.test_lookup_bytes(ctypes.byref(made)))
        held = (
            ctypes.c_void_p(address(packed.codebooks)),
            ctypes.byref(call),
            ctypes.c_void_p(address(scratch)),
        )
        assert library.test_lookup(ctypes.byref(made), *held, ctypes.c_int64(threads)) == 1
        compare(
            x, weight, bias, y, f"{layout} {m=} {n=} {k=}, looked up", TOLERANCE if size == 1 else OUTLIER
        )
        assert intact()
        return
    tasks = library.test_float_tasks(ctypes.byref(made), ctypes.c_int64(m))
    cuts = [i * tasks // threads for i in range(threads + 1)]

    def piece(begin: int, end: int) -> None:
        bounds = (ctypes.c_int64(begin), ctypes.c_int64(end))
        library.test_codebook_run(int(isa[1]), ctypes.byref(made), ctypes.byref(call), *bounds)

    workers = [threading.Thread(target=piece, args=pair) for pair in itertools.pairwise(cuts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert intact()
    compare(x, weight, bias, y, f"{layout} {m=} {n=} {k=}")


def aligned(size: int) -> np.ndarray:
    """Bytes from a multiple of 64 on, none of which is what a kernel could count on."""
    whole = np.full(size + 64, 0xA5, np.uint8)
    at = -address(whole) % 64
    return whole[at : at + size]


def compare(
    x: np.ndarray,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: np.ndarray,
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    wide = torch.from_numpy(x).double()
    expected, magnitude = wide @ weight.T, wide.abs() @ weight.abs().T + 1
    if bias is not None:
        expected = expected + bias.double()
    error = ((torch.from_numpy(y).double() - expected).abs() / magnitude).max().item()
    assert error < tolerance, f"{what}: {error:.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_against_decoder(library: ctypes.CDLL, isa: str, layout: tuple[int, int]) -> None:
    sizes = [(1, 16, 32), (1, 5, 7), (2, 33, 70), (3, 48, 128), (4, 40, 200), (5, 17, 130), (7, 31, 64)]
    sizes += [(13, 100, 300), (130, 37, 129), (6, 64, 2100)]
    for i, (m, n, k) in enumerate(sizes):
        check(library, isa, layout, m, n, k, threads=1 + i % 8, seed=i)


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    layout=st.sampled_from([(1, 8), (2, 8), (5, 8), (1, 16)]),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    threads=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
def test_ragged_shapes(
    library: ctypes.CDLL,
    isa: str,
    layout: tuple[int, int],
    m: int,
    n: int,
    k: int,
    threads: int,
    seed: int,
) -> None:
    check(library, isa, layout, m, n, k, threads, seed)


@pytest.mark.parametrize("count", [1, 2])
def test_products_are_looked_up(library: ctypes.CDLL, count: int) -> None:
    if not library.test_expands():
        pytest.skip("this processor has no AVX512-VBMI2")
    sizes = [(1, 16, 32), (1, 5, 7), (2, 33, 70), (3, 250, 128), (1, 256, 2100), (4, 600, 40)]
    for i, (m, n, k) in enumerate(sizes):
        check(library, "v4", (count, 8), m, n, k, threads=1 + i % 4, seed=i, look_up=True)
    # More bytes than 16 bits hold; one activation far above the others.
    check(library, "v4", (count, 8), 1, 64, 8 * 257 * 3, threads=2, seed=1, look_up=True)
    check(library, "v4", (count, 8), 1, 64, 8192, threads=1, seed=2, look_up=True, size=500.0)


def look_up_ones(library: ctypes.CDLL, x: np.ndarray) -> tuple[int, np.ndarray]:
    """What the driver says, and its 16 outputs (77 before): sums of a row of activations, with codebooks of ones."""
    if not library.test_expands():
        pytest.skip("this processor has no AVX512-VBMI2")
    k = x.shape[1]
    codes = torch.zeros(16, k // 8, 1, dtype=torch.uint8)
    packed = pack_codebook(CodebookMatrix(codes, torch.ones(1, 256, 8), torch.ones(16), k))
    linear = Linear(*map(address, (packed.weight, packed.scale, None, None, None)), 16, k, 0, 0, 1.0, 0, 0)
    made, y = Codebook(linear, 0, 1, 8), np.full((1, 16), 77, np.float32)
    call = FloatCall(address(x), 0, address(y), 1, k)
    scratch = aligned(library.test_lookup_bytes(ctypes.byref(made)))
    held = (ctypes.c_void_p(address(packed.codebooks)), ctypes.byref(call), ctypes.c_void_p(address(scratch)))
    return library.test_lookup(ctypes.byref(made), *held, ctypes.c_int64(1)), y


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e6], ids=str)
def test_activations_without_a_bound_are_left_to_the_other_kernels(library: ctypes.CDLL, bad: float) -> None:
    x = np.ones((1, 1 << 14), np.float32)
    x[0, 7] = bad
    done, y = look_up_ones(library, x)
    assert not done
    assert (y == 77).all()


@pytest.mark.parametrize("last", [0.0, 2.0, -1e-20])
def test_blocks_of_nothing_but_zeros_have_no_factor(library: ctypes.CDLL, last: float) -> None:
    x = np.zeros((1, 800), np.float32)
    x[0, 400:] = last
    done, y = look_up_ones(library, x)
    assert done
    assert (np.abs(y - 400 * np.float32(last)) <= 4e-4 * abs(last)).all()
