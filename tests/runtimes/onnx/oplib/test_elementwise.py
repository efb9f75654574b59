"""Gated, Rotary and PackedEmbedding against the dialect's references."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect.packing import pack_embedding_codes

Check = Callable[..., None]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (0, 4), (40, 1000)])
def test_gated(check: Check, shape: tuple[int, ...], activation: str) -> None:
    check("gated", [torch.randn(shape) * 4, torch.randn(shape), activation], threads=2, tolerance=1e-6)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "d"), [(64, 64), (20, 33), (2, 8), (48, 80)])
@pytest.mark.parametrize("heads", [-1, 2])
def test_rotary(check: Check, index: int, interleaved: bool, width: int, d: int, heads: int) -> None:
    batch, sequence, count = 2, 5, 3
    x = torch.randn([batch, sequence, count, d] if index == 2 else [batch, count, sequence, d])
    for lead in (1, batch):
        shape = [lead, sequence, 1, width] if index == 2 else [lead, 1, sequence, width]
        check(
            "rotary", [x, torch.randn(shape), torch.randn(shape), index, heads, interleaved], tolerance=1e-6
        )


def test_rotary_tables_of_lower_rank_and_of_different_shapes(check: Check) -> None:
    x = torch.randn(2, 3, 5, 16)
    check("rotary", [x, torch.randn(5, 16), torch.randn(2, 1, 5, 16), 1, -1, False])
    check("rotary", [x, torch.randn(1, 16), torch.randn(5, 16), 1, -1, True])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dim", "group"), [(64, 0), (33, 0), (96, 32), (70, 32), (20, 5)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_embedding(check: Check, bits: int, dim: int, group: int, asymmetric: bool) -> None:
    rows, groups = 50, -(-dim // group) if group else 1
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (rows, dim), dtype=torch.int8)
    scale = torch.rand(rows, groups)
    zero = torch.randint(-limit, limit, (rows, groups), dtype=torch.int8) if asymmetric else None
    table = pack_embedding_codes(codes, bits)
    for ids in (
        torch.randint(0, rows, (3, 4)),
        torch.tensor([-1, -rows, 0]),
        torch.zeros(0, dtype=torch.int64),
    ):
        for dtype in (torch.int64, torch.int32):
            arguments: list[object] = [ids.to(dtype), table, scale, zero, dim, bits, group]
            check("embedding_packed", arguments, constants=("weight", "scale", "zero"), tolerance=1e-6)


def test_embedding_ids_out_of_range_are_an_error(run_operator: Callable[..., list[Tensor]]) -> None:
    table, scale = torch.zeros(10, 8, dtype=torch.int8), torch.ones(10, 1)
    with pytest.raises(Exception, match=r"id at flat position 1 is 10; the table has rows -10\.\.9"):
        run_operator("embedding_packed", [torch.tensor([0, 10]), table, scale, None, 8, 8, 0])
    with pytest.raises(Exception, match="flat position 0 is -11"):
        run_operator("embedding_packed", [torch.tensor([-11]), table, scale, None, 8, 8, 0])
    with pytest.raises(Exception, match="expected int64 or int32, got float32"):
        run_operator("embedding_packed", [np.zeros(2, np.float32), table, scale, None, 8, 8, 0])
