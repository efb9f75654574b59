"""LayerNorm without its mean: an identity over the reals, and refused wherever a mean is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.passes import PassResult
from isofold.compiler.program import Program
from isofold.compiler.spaces.analysis import analyse
from isofold.compiler.spaces.atoms import Group
from isofold.passes.center_norms import center_norms
from isofold.passes.fold_norm_affine import fold_norm_affine

aten = torch.ops.aten
IDS = torch.tensor([[1, 4, 2, 9], [0, 3, 3, 10]])
Read = Callable[[Tensor, Tensor], Tensor]


class Stream(nn.Module):
    """Embedding and positions, two blocks, LayerNorm, head; `read` may look at the stream before a norm."""

    def __init__(self, read: Read | None = None, gain: bool = True) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(4, 8))
        self.norms = nn.ModuleList(nn.LayerNorm(8, elementwise_affine=gain) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.head = nn.Linear(8, 11)
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            y = self.read(x, norm(x)) if self.read else norm(x)
            x = x + down(F.gelu(up(y)))
        return self.head(self.norms[2](x))


def program_of(module: nn.Module, *args: Tensor) -> Program:
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return canonicalize(capture(module, args or (IDS,))).program


def centred(program: Program) -> PassResult:
    return center_norms(fold_norm_affine(program).program)


def norms_of(program: Program) -> list[object]:
    norms = (aten.layer_norm.default, aten.rms_norm.default)
    return [node.target for node in program.graph.nodes if node.target in norms]


@pytest.mark.parametrize("gain", [True, False])
def test_a_stream_of_parameters_is_centred(gain: bool) -> None:
    program = program_of(Stream(gain=gain))
    result = centred(program)
    assert norms_of(result.program) == [aten.rms_norm.default] * 3
    assert len(result.report.applied) == 3
    assert not result.report.refused
    assert relative_error(program.run_float64(), result.program.run_float64()) < 1e-13
    for name, dim in (("down.0.weight", 0), ("down.0.bias", 0)):
        assert result.program.tensors[name].mean(dim).abs().max() < 1e-14


def test_the_space_then_takes_all_orthogonal_maps() -> None:
    program = fold_norm_affine(program_of(Stream())).program

    def groups(of: Program) -> set[Group]:
        return {space.group for space in analyse(of).spaces if space.size == 8}

    assert groups(program) == {Group.FIX_ONES}
    assert groups(center_norms(program).program) == {Group.ORTHOGONAL}


def test_gains_must_be_folded_first() -> None:
    program = program_of(Stream())
    result = center_norms(program)
    assert not result.report.applied
    assert {r.reason for r in result.report.refused} == {"gains are not folded yet"}
    assert norms_of(result.program) == [aten.layer_norm.default] * 3


def test_who_sees_the_mean_is_named() -> None:
    """A linear that reads the stream itself would lose what the mean contributes."""
    program = program_of(WithSide())
    result = centred(program)
    assert not result.report.applied
    assert result.report.refused
    assert all("reads the stream before a norm" in r.reason for r in result.report.refused)
    assert relative_error(program.run_float64(), result.program.run_float64()) < 1e-13


class WithSide(Stream):
    """A side output that reads the stream without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.side(self.table(ids) + self.positions)


def test_a_stream_that_is_an_input_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x))

    program = program_of(Block(), torch.randn(2, 4, 8, dtype=torch.float64))
    result = centred(program)
    assert not result.report.applied
    (refused,) = result.report.refused
    assert "pinned" in refused.reason
    assert norms_of(result.program) == [aten.layer_norm.default]


def test_a_rms_norm_is_none_of_its_business() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(11, 8), nn.RMSNorm(8), nn.Linear(8, 11)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.table(ids)))

    result = centred(program_of(Root()))
    assert not result.report.applied
    assert not result.report.refused
