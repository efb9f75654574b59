"""Tables that several lookups read are shifted for all of them together; one that a head reads too is not."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.spaces.analysis import analyse


class TwoLookups(nn.Module):
    """Two sequences of one vocabulary, read by linears of their own, and perhaps a head of the same table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 8)
        self.tied = tied

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.table(a))) + torch.sigmoid(self.second(self.table(b)))
        out = self.head(hidden)
        return out @ self.table.weight.t() if self.tied else out


@pytest.mark.parametrize(("tied", "shifts"), [(False, 1), (True, 0)])
def test_a_table_of_two_lookups_has_one_shift(tied: bool, shifts: int, spaces_benchmark: ModuleType) -> None:
    ids = torch.arange(10).reshape(2, 5)
    program = canonicalize(capture(TwoLookups(tied), (ids, ids + 1))).program
    wide = spaces_benchmark.widened(program)
    spaces = analyse(wide)
    moved = [
        root
        for root in spaces.shifts.free_roots()
        if 8 in [a.size for a in spaces.shifts.ordered_support(root)]
    ]
    # With the head tied, what is shifted is the head's own input.
    assert len(moved) == shifts + tied
    folded = spaces_benchmark.folded(wide, torch.Generator().manual_seed(0))
    assert relative_error(wide.run_float64(), folded.run_float64()) < 1e-12
    table = str(next(n for n in wide.graph.nodes if "table" in n.name and n.op == "get_attr").target)
    assert not torch.equal(folded.tensors[table], wide.tensors[table])
