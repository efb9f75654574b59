"""DenseLinear: threads, instruction sets, no rows, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect.dense_packing import pack_dense

Check = Callable[..., None]


def dense_arguments(rows: int, n: int, k: int) -> list[Any]:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
    bias, residual = torch.randn(n, generator=generator), torch.randn(rows, n, generator=generator)
    return [x, pack_dense(weight), bias, residual, n, k, "gelu", False]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 5, 70, 300])
def test_threads(check: Check, threads: int, rows: int) -> None:
    check("linear_dense", dense_arguments(rows, 300, 1100), constants=("weight", "bias"), threads=threads)


def test_no_rows(run_operator: Callable[..., list[Tensor]]) -> None:
    none = dense_arguments(0, 48, 64)
    assert run_operator("linear_dense", none, constants=("weight", "bias"))[0].shape == (0, 48)


def test_a_wrong_layout_is_an_error(run_operator: Callable[..., list[Tensor]]) -> None:
    arguments = dense_arguments(3, 48, 64)
    arguments[1] = arguments[1].transpose(1, 2).contiguous()
    with pytest.raises(Exception, match=r"DenseLinear.*weight.*expected float32 \[2, 64, 32\]"):
        run_operator("linear_dense", arguments)
