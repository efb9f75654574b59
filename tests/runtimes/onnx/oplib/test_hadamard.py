"""Hadamard, and the quantizers that transform their rows first, against the dialect's references."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS

Run = Callable[..., list[Tensor]]
Check = Callable[..., None]


@pytest.mark.parametrize(
    "orders",
    [
        [], [1], [2], [4], [8], [16], [32], [64], [128], [256], [512], [1024], [2048], [4096], [16384],
        [12], [12, 2], [20, 4], [12, 8], [28, 16], [12, 32], [36, 64], [172, 64], [44, 28, 12, 2], [12, 12, 12, 8],
    ],
)  # fmt: skip
def test_hadamard(check: Check, orders: list[int]) -> None:
    size = math.prod(orders)
    for rows, blocks, transpose in ((3, 1, False), (2, 3, True)):
        if rows * blocks * size < 100000:
            check("hadamard", [torch.randn(rows, blocks * size), orders, transpose], tolerance=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_hadamard_of_many_rows(check: Check, threads: int) -> None:
    x = torch.randn(4, 50, 768)
    check("hadamard", [x, [12, 64], False], tolerance=2e-6, threads=threads)
    check("hadamard", [x, [64], False], tolerance=2e-6, threads=threads)
    check("hadamard", [torch.zeros(0, 64), [64], False])


def _close(actual: list[Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(actual[1], expected[1], atol=0, rtol=1e-5)
    difference = (actual[0].int() - expected[0].int()).abs()
    # Another order of sums: a value at the edge between two codes may fall on either side.
    assert int(difference.max()) <= 1
    assert float((difference != 0).float().mean()) < 0.002


@pytest.mark.parametrize("orders", [[12, 64], [256], [12, 4]])
def test_quantizers_transform_before_they_quantize(run_operator: Run, orders: list[int]) -> None:
    x, shift, scale = torch.randn(70, 768) * 3, torch.randn(768), torch.rand(768) + 0.5
    for bits, static, moved in product((8, 4), (False, True), (False, True)):
        pair = torch.tensor([18 / (2**bits - 1), 2.0 ** (bits - 1)]) if static else None
        vectors = (shift, scale) if moved else (None, None)
        arguments = [x, pair, 512, *vectors, bits, orders]
        u, params = run_operator("quantize_activation", arguments, 2)
        _close([u, params], OPERATORS["quantize_activation"].reference(*arguments))
        assert u.shape == (70, 1024)
        assert not u[:, 768:].any()
        plain, _ = OPERATORS["quantize_activation"].reference(*arguments[:-1])
        assert float((u.int() != plain.int()).float().mean()) > 0.3


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_transform_before_they_quantize(run_operator: Run, kind: str) -> None:
    x, r, w, b, shift, scale = torch.randn(40, 96), torch.randn(40, 96), *torch.randn(4, 96)
    for orders, static in product(([12, 8], [32]), (False, True)):
        pair = torch.tensor([0.05, 120.0]) if static else None
        arguments: list[Any] = [x, r, w, b, pair, 1e-5, kind, 64, shift, scale, 8, orders]
        total, y, u, params = run_operator("norm_quantize", arguments, 2)
        expected = OPERATORS["norm_quantize"].reference(*arguments)
        torch.testing.assert_close(y, expected[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(total, expected[0])
        _close([u, params], expected[2:])


@pytest.mark.parametrize(
    ("x", "orders", "message"),
    [
        (torch.ones(2, 30), [12], r"input 0 \(x\): expected a last dimension that is a multiple of 12"),
        (torch.ones(2, 24), [6, 4], r"'orders' has 6 at position 0; expected orders of known Hadamard"),
        (torch.ones(2, 48), [4, 12], r"'orders' has 4 at position 0"),
        (torch.ones(2, 8), [0], r"'orders' has 0 at position 0"),
        (torch.ones(2, 8), [2**40], r"larger than 2\^30"),
        (torch.ones(2, 8), [252, 2**62], r"larger than 2\^30"),
    ],
)
def test_bad_transforms_are_errors_that_say_why(
    run_operator: Run, x: Tensor, orders: list[int], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        run_operator("hadamard", [x, orders, False])
