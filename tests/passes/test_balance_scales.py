"""Balancing: the same function, and one result for all programs that differ by scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.program import Program
from isofold.passes.balance_scales import balance_scales


class Net(nn.Module):
    """Attention of two heads (scales of queries against keys, of values), ReLU between two linears, a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.second(F.relu(self.first(x)))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


PAIRS = (("first", "second"), ("up", "down"), ("v", "o"))
"""Who writes a value that may be scaled, and who reads it."""


def twin(scales: dict[str, Tensor]) -> Program:
    """Net in float64 with the outputs of some linears scaled up, and what reads them scaled down."""
    torch.manual_seed(3)
    net = Net().double().eval()
    with torch.no_grad():
        for writer, reader in PAIRS:
            if writer in scales:
                s = scales[writer]
                getattr(net, writer).weight.mul_(s[:, None])
                getattr(net, writer).bias.mul_(s)
                getattr(net, reader).weight.div_(s)
        if "k" in scales:
            for name, s in (("k", scales["k"]), ("q", 1 / scales["k"])):
                getattr(net, name).weight.mul_(s[:, None])
                getattr(net, name).bias.mul_(s)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return canonicalize(capture(net, (x,))).program


def random_scales() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        name: torch.exp(1.5 * torch.randn(size, generator=g, dtype=torch.float64))
        for name, size in (("first", 12), ("up", 6), ("v", 8), ("k", 8))
    }


def test_it_is_an_identity_in_float64() -> None:
    program = twin(random_scales())
    after = balance_scales(program)
    assert relative_error(program.run_float64(), after.program.run_float64()) < 1e-13
    assert not torch.equal(after.program.tensors["first.weight"], program.tensors["first.weight"])


def test_twins_that_differ_by_scales_become_equal() -> None:
    plain, other = twin({}), twin(random_scales())
    assert relative_error(plain.run_float64(), other.run_float64()) < 1e-12
    one, two = balance_scales(plain).program, balance_scales(other).program
    for name in plain.parameters:
        torch.testing.assert_close(one.tensors[name], two.tensors[name], rtol=1e-5, atol=1e-7)
    apart = (plain.tensors["first.weight"] / other.tensors["first.weight"]).log().abs().max()
    assert apart > 0.5


@pytest.mark.parametrize("writer", ["first", "up", "v"])
def test_both_sides_have_one_norm(writer: str) -> None:
    """The stationary point of the sum of squares: what is scaled up weighs as much as what is scaled down."""
    program = balance_scales(twin(random_scales())).program
    reader = dict(PAIRS)[writer]
    written = program.tensors[f"{writer}.weight"].square().sum(1) + program.tensors[f"{writer}.bias"].square()
    torch.testing.assert_close(
        written, program.tensors[f"{reader}.weight"].square().sum(0), rtol=1e-5, atol=0
    )


def test_a_second_time_changes_nothing() -> None:
    once = balance_scales(twin(random_scales())).program
    again = balance_scales(once).program
    for name in once.parameters:
        torch.testing.assert_close(once.tensors[name], again.tensors[name], rtol=1e-5, atol=1e-7)


def test_a_dead_channel_keeps_its_scale() -> None:
    program = twin({})
    program.tensors["second.weight"].data[:, 4] = 0
    after = balance_scales(program).program
    assert torch.equal(after.tensors["first.weight"][4], program.tensors["first.weight"][4])
    assert all(torch.isfinite(held).all() for held in after.parameters.values())


def test_the_driver_accepts_it_in_float32() -> None:
    torch.manual_seed(3)
    program = canonicalize(capture(Net().eval(), (torch.randn(2, 5, 8),))).program
    _, (report,) = run_steps(program, [Step(balance_scales)])
    assert report.applied
    assert report.error is not None
    assert 0 < report.error < 2e-5
