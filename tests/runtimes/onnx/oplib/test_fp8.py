"""QuantizeActivationFp8 and Fp8Linear: codes bit for bit, threads, instruction sets, no rows, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.dialect.packing_coded import pack_coded
from isofold.passes.code_ranges import quantize_codes

from ....compiler.dialect.test_fp8 import boundaries

Check = Callable[..., None]
Run = Callable[..., list[Tensor]]
WEIGHTS = ("weight", "scale", "bias")
quantize = OPERATORS["quantize_activation_fp8"].reference


def linear(name: str, rows: int, n: int, k: int, static: bool = False, group: int = 0) -> list[Any]:
    """Arguments of linear_fp8, with bias, residual and an activation."""
    g = torch.Generator().manual_seed(rows)
    x, bias, residual = (torch.randn(*shape, generator=g) for shape in ((rows, k), (n,), (rows, n)))
    group = 32 if name.startswith("mx") else group
    p = pack_coded(quantize_codes(torch.randn(n, k, generator=g), name, group, "absmax"))
    u, s = quantize(x, torch.tensor([0.01]) if static else None, max(group, 32))
    return [u, s, p.weight, p.scale, bias, residual, n, k, name, group, p.scale_multiplier, "gelu", False]


def test_codes_of_every_boundary_are_those_of_the_reference(run_operator: Run) -> None:
    """Vectors and what is left over behind them."""
    points = boundaries()
    points = torch.cat([points, -points, torch.tensor([0.0, -0.0, 1e9, -1e9, 1e-40])])
    for x in (points[None], points[:, None].expand(-1, 3).contiguous()):
        u, _ = run_operator("quantize_activation_fp8", [x, torch.ones(1), 32])
        assert torch.equal(u, quantize(x, torch.ones(1), 32)[0])


@pytest.mark.parametrize("k", [1, 15, 16, 63, 64, 130, 1100])
@pytest.mark.parametrize("static", [False, True])
def test_rows_are_the_reference_bit_for_bit(run_operator: Run, k: int, static: bool) -> None:
    g = torch.Generator().manual_seed(k)
    x, shift, scale = torch.randn(5, k, generator=g), torch.randn(k, generator=g), torch.randn(k, generator=g)
    x[1] = 0.0
    pair = torch.tensor([0.004]) if static else None
    for vectors in ((None, None), (shift, None), (None, scale), (shift, scale)):
        arguments = [x, pair, 32, *vectors]
        got = run_operator("quantize_activation_fp8", arguments, threads=2)
        for a, b in zip(got, quantize(*arguments), strict=True):
            assert torch.equal(a, b)


def test_tokens_that_are_not_finite(run_operator: Run) -> None:
    x = torch.ones(4, 40)
    x[1, 20], x[2, 39] = torch.nan, torch.inf
    u, s = run_operator("quantize_activation_fp8", [x, None, 32])
    arguments = linear("e4m3", 4, 8, 40)
    y = run_operator("linear_fp8", [u, s, *arguments[2:]], constants=WEIGHTS)[0]
    assert [bool(row.isfinite().all()) for row in y] == [True, False, False, True]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("name", "group"), [("e4m3", 0), ("e5m2", 64), ("mxfp8_e4m3", 32)])
def test_threads(check: Check, name: str, group: int, threads: int, rows: int) -> None:
    arguments = linear(name, rows, 300, 1100, rows == 3, group)
    check("linear_fp8", arguments, constants=WEIGHTS, threads=threads)


def test_no_rows_and_weights_that_are_not_constant(run_operator: Run, check: Check) -> None:
    assert run_operator("linear_fp8", linear("e4m3", 0, 48, 64), constants=WEIGHTS)[0].shape == (0, 48)
    u, s = run_operator("quantize_activation_fp8", [torch.zeros(0, 20), None, 32])
    assert (u.shape, s.shape) == ((0, 32), (0, 1))
    check("linear_fp8", linear("e5m2", 4, 33, 45))


WRONG: list[tuple[dict[int, Any], str]] = [
    ({8: "nf4", 9: 32}, r"attribute 'format' is nf4; expected e4m3, e5m2, mxfp8_e4m3 or mxfp8_e5m2"),
    ({9: 48}, r"'group_size' is 48; expected 0, 32, 64 or 128 for format e4m3"),
    ({0: torch.zeros(2, 63, dtype=torch.uint8)}, r"input 0 \(u\): expected at least 64 codes in the last"),
    ({1: torch.zeros(2, 2)}, r"input 1 \(params\): expected float32 \[2, 1\], got float32 \[2, 2\]"),
    ({3: torch.zeros(3, 2, 16)}, r"input 3 \(scale\): expected float32 \[3, 1, 16\], got float32"),
    ({5: torch.zeros(2, 41)}, r"input 5 \(residual\): expected float32 \[2, 40\]"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_inputs_are_named(run_operator: Run, changes: dict[int, Any], message: str) -> None:
    arguments = linear("e4m3", 2, 40, 64)
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(Exception, match=message):
        run_operator("linear_fp8", arguments, constants=WEIGHTS)


def test_wrong_vectors_are_named(run_operator: Run) -> None:
    with pytest.raises(Exception, match=r"input 1 \(params\): expected float32 \[1\], got float32 \[2\]"):
        run_operator("quantize_activation_fp8", [torch.ones(2, 8), torch.ones(2), 32])
    with pytest.raises(Exception, match=r"input 2 \(shift\): expected float32 \[8\], got float32 \[7\]"):
        run_operator("quantize_activation_fp8", [torch.ones(2, 8), None, 32, torch.ones(7)])
