"""The sparse encoding: exact both ways for every shape and density, laid out as its docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isofold.compiler.dialect.sparse_packing import pack_sparse, sparse_bytes, unpack_sparse
from isofold.compiler.errors import InputError


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.int8]),
    seed=st.integers(0, 99),
)
def test_matrices_survive_and_follow_the_index_formula(
    n: int, k: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < density)
    matrix = (drawn * 50).clamp(-128, 127).to(dtype)
    packed = pack_sparse(matrix)
    rows, words = -(-n // 16) * 16, -(-k // 64)
    assert list(packed.mask.shape) == [rows, 8 * words]
    assert packed.offsets.dtype == torch.int32
    assert list(packed.offsets.shape) == [rows + 1]
    assert packed.nonzeros == int((matrix != 0).sum())
    assert len(packed.values) % 64 == 0
    assert len(packed.values) >= packed.nonzeros + 16
    assert packed.nbytes == sparse_bytes(n, k, packed.nonzeros, matrix.element_size())
    assert torch.equal(unpack_sparse(packed.mask, packed.values, n, k), matrix)
    everything = unpack_sparse(packed.mask, packed.values, rows, 64 * words)
    assert not everything[n:].any()
    assert not everything[:, k:].any()
    row, column = seed % n, (7 * seed) % k
    bit = int(packed.mask[row, column // 8]) >> column % 8 & 1
    assert bit == int(matrix[row, column] != 0)
    if bit:
        before = int((matrix[row, :column] != 0).sum())
        assert packed.values[int(packed.offsets[row]) + before] == matrix[row, column]


def test_the_example_of_the_documentation() -> None:
    packed = pack_sparse(torch.tensor([[0, 7, 0, 0, -2]], dtype=torch.int8))
    assert packed.mask[0].tolist() == [18, 0, 0, 0, 0, 0, 0, 0]
    assert packed.values[:3].tolist() == [7, -2, 0]
    assert packed.offsets.tolist() == [0] + [2] * 16
    assert packed.density == 0.4


def test_negative_zero_is_a_zero_and_denormals_are_values() -> None:
    matrix = torch.tensor([[-0.0, 1e-45, 3.4e38, -1e-38]])
    packed = pack_sparse(matrix)
    assert packed.nonzeros == 3
    assert torch.equal(unpack_sparse(packed.mask, packed.values, 1, 4), matrix)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="1 of 2 values"):
        pack_sparse(torch.tensor([[0.0, bad]]))


def test_other_types_are_refused() -> None:
    for wrong in (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3)):
        with pytest.raises(InputError, match=r"torch.float32 or torch.int8 \[N, K\]"):
            pack_sparse(wrong)
