"""QuantizePackedLinear: bit for bit QuantizeActivation and then PackedLinear (whose own tests have the reference)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS
from isofold.compiler.dialect.packing import alignment

from .test_linear import WEIGHTS, linear_arguments

Run = Callable[..., list[Tensor]]
ROWS = [(1,), (2,), (7,), (128,), (2, 3), (0, 4)]


def compare(
    run_operator: Run,
    shape: tuple[int, ...],
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    static: bool = False,
    vectors: bool = False,
    input_bits: int = 8,
    hadamard: tuple[int, ...] = (),
    threads: int = 1,
    **linear: Any,
) -> None:
    """The fused operator against the two that it stands for, in the library; and against the reference."""
    _, _, *rest = linear_arguments(shape, n, k, bits, group_size, **linear)
    x = torch.randn(*shape, k) * 2
    pair = torch.tensor([10 / (2**input_bits - 1), 2.0 ** (input_bits - 1)]) if static else None
    shift, scale = (torch.randn(k), torch.rand(k) + 0.5) if vectors else (None, None)
    rounding = (shift, scale, input_bits, list(hadamard))
    arguments = [x, pair, shift, scale, *rest, input_bits, list(hadamard)]
    constants = (*WEIGHTS, "pre_shift", "pre_scale")
    (got,) = run_operator("quantize_linear_packed", arguments, threads, constants=constants)
    two = [x, pair, alignment(group_size), *rounding]
    u, params = run_operator("quantize_activation", two, threads)
    (expected,) = run_operator("linear_packed", [u, params, *rest], threads, constants=WEIGHTS)
    assert torch.equal(got, expected)
    if got.numel():
        doubled = [a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in rest]
        wide = OPERATORS["linear_packed"].reference(u, params.double(), *doubled)
        assert float((got - wide).abs().max()) <= 1e-5 * max(1.0, float(wide.abs().max()))
        reference = OPERATORS["quantize_linear_packed"].reference(*arguments)
        # Another order of sums inside a transform moves few codes by one step.
        error = float((got - reference).norm() / reference.norm())
        assert error <= (2e-2 if hadamard else 1e-5)


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (8, 64), (4, 0), (4, 32), (4, 128)])
def test_formats(run_operator: Run, shape: tuple[int, ...], bits: int, group_size: int) -> None:
    for i, (static, asymmetric) in enumerate(product((False, True), repeat=2)):
        options = {"static": static, "asymmetric": asymmetric, "bias": i % 2 == 0, "residual": i % 3 == 0}
        compare(run_operator, shape, 45, 150, bits, group_size, **options)  # type: ignore[arg-type] # one dict


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("input_bits", [8, 4])
@pytest.mark.parametrize("hadamard", [(), (12, 8), (16,)])
def test_quantizers(
    run_operator: Run, shape: tuple[int, ...], input_bits: int, hadamard: tuple[int, ...]
) -> None:
    for i, (static, vectors) in enumerate(product((False, True), repeat=2)):
        rounding: dict[str, Any] = {"static": static, "vectors": vectors, "input_bits": input_bits}
        format_, asymmetric = ((4, 32), (8, 0))[i % 2], i == 2
        compare(run_operator, shape, 33, 192, *format_, hadamard=hadamard, asymmetric=asymmetric, **rounding)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_epilogues(run_operator: Run, activation: str, gated: bool) -> None:
    options: dict[str, Any] = {"activation": activation, "gated": gated, "residual": True}
    compare(run_operator, (2, 9), 40, 64, 8, 0, **options)
    compare(run_operator, (1,), 33, 96, 4, 32, vectors=True, **options)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 7, 128, 300])
def test_threads(run_operator: Run, rows: int, threads: int) -> None:
    compare(run_operator, (rows,), 300, 1100, 4, 32, threads=threads)
    compare(run_operator, (rows,), 300, 768, 8, 0, asymmetric=True, hadamard=(12, 64), threads=threads)


def test_ragged_sizes(run_operator: Run) -> None:
    for n, k in ((1, 1), (16, 5), (17, 33), (31, 127)):
        compare(run_operator, (3,), n, k, 4, 32, asymmetric=True)
        compare(run_operator, (1,), n, k, 8, 0, static=True)


def test_weights_and_a_pair_that_are_not_constant(run_operator: Run) -> None:
    _, _, *rest = linear_arguments((4,), 48, 70, 8, 0)
    x, pair = torch.randn(4, 70), torch.tensor([0.03, 120.0])
    arguments = [x, pair, None, None, *rest]
    (got,) = run_operator("quantize_linear_packed", arguments)
    assert torch.equal(
        got, run_operator("quantize_linear_packed", arguments, constants=(*WEIGHTS, "params"))[0]
    )
