"""Float32 linears take panels; what cannot says why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isofold.compiler.capture import capture
from isofold.compiler.dialect import linear_dense
from isofold.compiler.driver import Step, run_steps
from isofold.passes.fuse_epilogues import fuse_epilogues
from isofold.passes.pack_dense_linears import pack_dense_linears


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(40, 70)
        self.down = nn.Linear(70, 40, bias=False)
        self.down_again = nn.Linear(70, 40)
        self.down_again.weight = self.down.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(x))
        return self.down(h) + self.down_again(h) + nn.functional.linear(x, y)


def test_constants_are_packed_once_and_activations_become_epilogues() -> None:
    torch.manual_seed(0)
    model = _Model().eval()
    args = (torch.randn(3, 5, 40), torch.randn(40, 40))
    program, reports = run_steps(capture(model, args), [Step(pack_dense_linears), Step(fuse_epilogues)])
    calls = [n for n in program.graph.nodes if n.target == linear_dense.overload]
    assert [n.args[6] for n in calls] == ["gelu", "none", "none"]
    assert calls[1].args[1] is calls[2].args[1]
    assert torch.allclose(program(*args), model(*args), atol=1e-5)
    refused = [r for report in reports for r in report.refused]
    assert any("its weight is computed" in r.reason for r in refused)
