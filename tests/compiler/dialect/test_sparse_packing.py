"""The sparse encodings: exact both ways for every shape and density, laid out as their docstrings say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isofold.compiler.dialect.sparse_layouts import HELD, LAYOUTS
from isofold.compiler.dialect.sparse_packing import PackedSparse, pack_sparse, unpack_sparse
from isofold.compiler.errors import InputError

FORMS = [(layout, value) for layout, values in HELD.items() for value in values]


def unpack(p: PackedSparse) -> Tensor:
    return unpack_sparse(p.layout, p.places, p.values, p.offsets, p.n, p.k, p.bits)


def drawn(n: int, k: int, density: float, layout: str, value: str, seed: int) -> Tensor:
    """A matrix of the pattern of `layout`."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=generator)
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        order = torch.rand(n, -(-k // of), of, generator=generator).argsort(-1)
        keep = (order < some).flatten(1)[:, :k] & (torch.rand(n, k, generator=generator) < 2 * density)
    else:
        keep = torch.rand(n, k, generator=generator) < density
        if layout == "windows":
            keep[:, 255::256] = False
    if value.startswith("int"):
        limit = 8 if value == "int4" else 128
        return (matrix * limit / 3).round().clamp(-limit, limit - 1).to(torch.int8) * keep
    return (matrix * keep).to(getattr(torch, value))


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 600),
    density=st.floats(0, 1),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_matrices_survive(n: int, k: int, density: float, form: tuple[str, str], seed: int) -> None:
    layout, value = form
    matrix = drawn(n, k, density, layout, value, seed)
    packed = pack_sparse(matrix, layout, 4 if value == "int4" else 8)
    found = unpack(packed)
    assert found.dtype == matrix.dtype
    assert torch.equal(found, matrix)
    assert packed.stored >= int((matrix != 0).sum())
    if layout in ("bitmask", "panels", "windows"):
        assert packed.stored == int((matrix != 0).sum())
    sizes = sum(t.numel() * t.element_size() for t in (packed.places, packed.values, packed.offsets))
    assert packed.nbytes == sizes


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), k=st.integers(1, 200), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_bitmask_follows_its_index_formula(n: int, k: int, density: float, seed: int) -> None:
    for value in HELD["bitmask"]:
        matrix = drawn(n, k, density, "bitmask", value, seed)
        packed = pack_sparse(matrix, "bitmask", 4 if value == "int4" else 8)
        assert list(packed.places.shape) == [-(-n // 16) * 16, 8 * -(-k // 64)]
        assert packed.offsets.dtype == torch.int32
        assert len(packed.values) % 64 == 0
        assert len(packed.values) >= int(packed.offsets[-1]) + 64
        assert not packed.places[n:].any()
        row, column = seed % n, (7 * seed) % k
        bit = int(packed.places[row, column // 8]) >> column % 8 & 1
        assert bit == int(matrix[row, column] != 0)
        if not bit:
            continue
        start = int(packed.offsets[row])
        if value == "int4":
            counts = [int((matrix[row, c : c + 64] != 0).sum()) for c in range(0, column // 64 * 64, 64)]
            inside = int((matrix[row, column // 64 * 64 : column] != 0).sum())
            byte = int(packed.values[start + sum((count + 1) // 2 for count in counts) + inside // 2])
            nibble = byte >> 4 * (inside % 2) & 15
            assert (nibble ^ 8) - 8 == int(matrix[row, column])
            continue
        found = packed.values[start + int((matrix[row, :column] != 0).sum())]
        assert (found.view(torch.bfloat16) if value == "bfloat16" else found) == matrix[row, column]


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), k=st.integers(1, 300), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_panels_follow_their_index_formula(n: int, k: int, density: float, seed: int) -> None:
    matrix = drawn(n, k, density, "panels", "int4", seed)
    packed = pack_sparse(matrix, "panels", 4)
    pairs, words = -(-n // 32), -(-k // 128) * 32
    assert list(packed.places.shape) == [pairs, 16 * words]
    assert len(packed.values) % 64 == 0
    assert len(packed.values) >= int(packed.offsets[-1]) + 64
    row, column = seed % n, (7 * seed) % k
    pair, half, bit = row // 32, row // 16 % 2, 4 * (row % 16) + column % 4
    stored = bytes(packed.places[pair].tolist())
    there = [int.from_bytes(stored[8 * w : 8 * w + 8], "little") for w in range(half, 2 * words, 2)]
    assert there[column // 4] >> bit & 1 == int(matrix[row, column] != 0)
    if matrix[row, column] == 0:
        return
    inside = (there[column // 4] & ((1 << bit) - 1)).bit_count()
    in_front = sum(word.bit_count() for word in there[: column // 4])
    byte = int(packed.values[int(packed.offsets[pair]) + in_front + inside])
    assert ((byte >> 4 * half & 15) ^ 8) - 8 == int(matrix[row, column])


def test_the_examples_of_the_documentation() -> None:
    row = torch.tensor([[0, 7, 0, 0, -2]], dtype=torch.int8)
    bitmask = pack_sparse(row)
    assert bitmask.places[0].tolist() == [18, 0, 0, 0, 0, 0, 0, 0]
    assert bitmask.values[:3].tolist() == [7, -2, 0]
    assert bitmask.offsets.tolist() == [0] + [2] * 16
    assert bitmask.density == 0.4
    int4 = pack_sparse(row, bits=4)
    assert int4.values[0] == 0xE7
    assert int4.offsets.tolist() == [0] + [1] * 16
    panels = pack_sparse(row, "panels", 4)
    assert panels.places[0].tolist() == [2] + [0] * 15 + [1] + [0] * 495
    assert panels.values[:3].tolist() == [0x07, 0x0E, 0]
    assert panels.offsets.tolist() == [0, 2]
    two = torch.cat([row, torch.zeros(15, 5, dtype=torch.int8), row.new_tensor([[3, 0, 0, 0, 0]])])
    panels = pack_sparse(two, "panels", 4)
    assert panels.places[0].tolist() == [2] + [0] * 7 + [1] + [0] * 7 + [1] + [0] * 495
    assert panels.values[:3].tolist() == [0x37, 0x0E, 0]
    wide = torch.zeros(1, 300, dtype=torch.int8)
    wide[0, 3], wide[0, 260] = 7, -2
    windows = pack_sparse(wide, "windows")
    assert windows.places[:35].tolist() == [1] + [0] * 15 + [1] + [0] * 15 + [3, 4, 0]
    assert windows.values[:3].tolist() == [7, -2, 0]
    assert windows.offsets.tolist() == [0, 2]
    groups = pack_sparse(torch.tensor([[0, 7, 0, -2, 0, 0, 0, 5]], dtype=torch.int8), "2:4")
    assert groups.values[0, 0, :5].tolist() == [7, -2, 0, 5, 0]
    assert groups.places[0, 0].tolist() == [0xCD] + [0x44] * 15
    columns = pack_sparse(row.float(), "16x1")
    assert columns.places.to(torch.int32)[:3].tolist() == [1, 4, 0]
    assert columns.values[:2, :2, 0].tolist() == [[7, 0], [-2, 0]]
    assert columns.offsets.tolist() == [0, 2]
    fours = pack_sparse(row, "1x4")
    assert fours.places[0, 0] == 3
    assert fours.values[:8].tolist() == [0, 7, 0, 0, -2, 0, 0, 0]


def test_negative_zero_is_a_zero_and_denormals_are_values() -> None:
    matrix = torch.tensor([[-0.0, 1e-45, 3.4e38, -1e-38]])
    for layout in ("bitmask", "16x1"):
        packed = pack_sparse(matrix, layout)
        assert packed.offsets[-1] == 3
        assert torch.equal(unpack(packed), matrix)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["bitmask", "16x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused(bad: float, layout: str, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="1 of 2 values"):
        pack_sparse(torch.tensor([[0.0, bad]], dtype=dtype), layout)


def test_what_a_layout_does_not_hold_is_refused() -> None:
    codes = torch.ones(2, 512, dtype=torch.int8)
    for wrong in (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3)):
        with pytest.raises(InputError, match=r"or torch.int8 \[N, K\]"):
            pack_sparse(wrong)
    with pytest.raises(InputError, match="do not fit 4 bits"):
        pack_sparse(torch.tensor([[8]], dtype=torch.int8), bits=4)
    with pytest.raises(InputError, match="one of bitmask, panels, windows"):
        pack_sparse(codes, "3:4")
    with pytest.raises(InputError, match="at most 255"):
        pack_sparse(codes, "windows")
    with pytest.raises(InputError, match="at most 2 non-zeros in every 4 inputs"):
        pack_sparse(codes, "2:4")
    with pytest.raises(InputError, match="holds int4 codes"):
        pack_sparse(codes, "panels")
    for layout in LAYOUTS:
        other = codes if layout == "16x1" else codes.float()
        if layout != "bitmask":
            with pytest.raises(InputError, match="hold"):
                pack_sparse(other, layout)
    with pytest.raises(InputError, match="65,536 columns"):
        pack_sparse(torch.zeros(1, 65537), "16x1")
