"""Changes of basis: the same numbers in parts as at once, by the fast transform as by the matrix."""

from __future__ import annotations

import pytest
import torch

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.driver import relative_error
from isofold.compiler.editor import Editor
from isofold.compiler.hadamard import hadamard_matrix, randomised_hadamard
from isofold.compiler.program import Program
from isofold.compiler.spaces import analyse, change, sample
from isofold.compiler.spaces.change import Basis, apply_bases, apply_factors, apply_shifts
from isofold.compiler.spaces.transform import random_orthogonal
from isofold.passes.fold_norm_affine import fold_norm_affine

from ...captured import captured


@pytest.fixture(scope="module", params=["llama", "bert"])
def program(request: pytest.FixtureRequest) -> Program:
    return fold_norm_affine(canonicalize(captured(request.param)[1]).program).program


def changed(program: Program) -> dict[str, torch.Tensor]:
    """Parameters after random members of all groups."""
    for draw, apply in (
        (sample.random_bases, apply_bases),
        (sample.random_factors, apply_factors),
        (sample.random_shifts, apply_shifts),
    ):
        spaces, editor = analyse(program), Editor(program)
        apply(editor, spaces, draw(spaces, torch.Generator().manual_seed(0)))  # type: ignore[operator]
        program = editor.finish()
    return program.parameters


def test_parts_give_what_the_whole_gives(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = changed(program)
    monkeypatch.setattr(change, "_ELEMENTS_AT_ONCE", 100)
    parts = changed(program)
    assert sum(not torch.equal(held, program.parameters.get(name, held)) for name, held in whole.items()) > 10
    for name, held in whole.items():
        assert held.is_contiguous()
        # Sums in another order: the last bit of the rounded number at most.
        assert torch.allclose(parts[name], held, rtol=2e-7, atol=1e-7), name


@pytest.mark.parametrize("n", [16, 48, 64])
def test_hadamard_matrices_are_recognised(n: int) -> None:
    view = torch.randn(3, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = randomised_hadamard(n, 1).mT
    fast = Basis(matrix)
    assert fast.signs is not None
    expected = torch.einsum("ij,ajb->aib", matrix, view)
    for sign in (1, -1):
        assert torch.allclose(fast.along(view, 1, sign, []), expected, rtol=0, atol=1e-12)


def test_other_matrices_are_not() -> None:
    almost = hadamard_matrix(16).mT.clone()
    almost[3, 4] *= -1
    turned = randomised_hadamard(16, 0)
    dense = random_orthogonal(16, torch.Generator().manual_seed(0))
    for matrix in (almost, turned, dense, torch.eye(16, dtype=torch.float64), torch.stack([dense] * 2)):
        assert Basis(matrix).signs is None


def test_results_in_float64_do_not_depend_on_parts(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = program.run_float64()
    monkeypatch.setattr("isofold.compiler.program._LARGE", 100)
    assert relative_error(whole, program.run_float64()) < 1e-14
