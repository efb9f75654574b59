"""Norm and NormQuantize against the dialect's references."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from isofold.compiler.dialect import OPERATORS

Run = Callable[..., list[Tensor]]
Check = Callable[..., None]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(2, 5, 20), (3, 64), (1, 1), (2, 783), (0, 16)])
def test_norm(check: Check, shape: tuple[int, ...], kind: str) -> None:
    for residual, weight, bias in product([False, True], repeat=3):
        x, k = torch.randn(shape) * 2 + 1, shape[-1]
        r, w, b = torch.randn(shape), torch.randn(k), torch.randn(k)
        arguments = [x, r if residual else None, w if weight else None, b if bias else None, 1e-5, kind]
        check("norm", arguments, constants=("weight", "bias"))


def test_norm_does_not_cancel_far_from_zero(check: Check) -> None:
    x = torch.randn(4, 300) + 1000
    check("norm", [x, None, None, None, 1e-6, "layer"], tolerance=2e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_norm_quantize_with_any_outputs(run_operator: Run, kind: str, static: bool, threads: int) -> None:
    x, r, w, b = torch.randn(40, 200), torch.randn(40, 200), torch.randn(200), torch.randn(200)
    pair = torch.tensor([0.02, 120.0]) if static else None
    arguments = [x, r, w, b, pair, 1e-5, kind, 64]
    total, y, u, params = OPERATORS["norm_quantize"].reference(*arguments)
    for wants_sum, wants_y in product([False, True], repeat=2):
        got = run_operator(
            "norm_quantize",
            arguments,
            threads,
            outputs=[wants_sum, wants_y, True, True],
            constants=("weight", "bias"),
        )
        assert len(got) == 2 + wants_sum + wants_y
        if wants_sum:
            assert torch.equal(got[0], total)
        if wants_y:
            torch.testing.assert_close(got[wants_sum], y, atol=1e-5, rtol=1e-5)
        assert got[-2].shape == (40, 256)
        assert not got[-2][:, 200:].any()
        # The norm sums in another order than torch: a value at the edge between two codes may fall on either side.
        difference = (got[-2].int() - u.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference != 0).float().mean()) < 0.002
        torch.testing.assert_close(got[-1], params, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("static", [False, True])
def test_norm_quantize_is_quantize_activation_of_its_own_result(
    run_operator: Run, static: bool, bits: int
) -> None:
    """Bit for bit, with shift and scale, which y does not see."""
    x, w, shift, scale = torch.randn(6, 90), torch.randn(90), torch.randn(90), torch.randn(90)
    pair = torch.tensor([5 / 2**bits, 2.0 ** (bits - 1)]) if static else None
    for z, r in product((None, shift), (None, scale)):
        rest = (32, z, r, bits)
        _, y, u, params = run_operator("norm_quantize", [x, None, w, None, pair, 1e-5, "rms", *rest])
        expected_u, expected_params = OPERATORS["quantize_activation"].reference(y, pair, *rest)
        assert torch.equal(u, expected_u)
        assert torch.equal(params, expected_params)
        assert int(u.max()) == 2**bits - 1
        assert torch.equal(y, run_operator("norm", [x, None, w, None, 1e-5, "rms"])[1])
        assert torch.equal(run_operator("quantize_activation", [y, pair, *rest])[0], u)
