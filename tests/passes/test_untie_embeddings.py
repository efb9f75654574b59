"""Copies of shared tables: only where a gain folds then that did not before, and bit for bit the same program."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.program import Program
from isofold.passes.fold_norm_affine import fold_norm_affine
from isofold.passes.untie_embeddings import untie_embeddings

IDS = torch.tensor([[1, 4, 2, 9]])


class Language(nn.Module):
    """Embedding, one layer, norm (or none), head; tied or not."""

    def __init__(self, *, tied: bool, normed: bool = True) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8) if normed else nn.Identity()
        if normed:
            nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.norm(x + self.inner(x)))


def program_of(**options: bool) -> Program:
    torch.manual_seed(0)
    return canonicalize(capture(Language(**options).eval(), (IDS,))).program


def test_a_tied_table_is_copied_and_then_the_last_gain_folds() -> None:
    program = program_of(tied=True)
    assert not fold_norm_affine(program).report.applied
    after, (untied, folded) = run_steps(program, [Step(untie_embeddings), Step(fold_norm_affine)])
    assert untied.error == 0
    (entry,) = untied.to_json()["applied"]
    assert entry["bytes"] == 11 * 8 * 4
    assert "352 bytes more" in entry["what"]
    assert folded.applied
    assert after.weight_bytes == program.weight_bytes + 352 - 8 * 4


def test_results_are_the_same_bits() -> None:
    program = program_of(tied=True)
    (want,), (got,) = program.run_float64(), untie_embeddings(program).program.run_float64()
    assert torch.equal(want, got)


def test_nothing_is_copied_where_no_gain_gets_free() -> None:
    program = program_of(tied=True, normed=False)
    result = untie_embeddings(program)
    assert not result.report.applied
    (refused,) = result.report.refused
    assert "would fold no more gains" in refused.reason
    assert result.program.weight_bytes == program.weight_bytes
    assert set(result.program.parameters) == set(program.parameters)


def test_two_tables_are_left_alone() -> None:
    result = untie_embeddings(program_of(tied=False))
    assert not result.report.applied
    assert not result.report.refused
