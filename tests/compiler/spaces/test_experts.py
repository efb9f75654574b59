"""Experts are inside the spaces: the stream turns, hidden channels move as one, scales differ between experts."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.compiler.editor import Editor
from isofold.compiler.program import Program
from isofold.compiler.spaces import sample
from isofold.compiler.spaces.analysis import Space, Spaces, analyse
from isofold.compiler.spaces.atoms import Group
from isofold.compiler.spaces.removal import dead_indices, reason_against, remove
from isofold.passes.balance_scales import balance_scales

E, D, H, TOP = 3, 8, 6, 2


class Experts(nn.Module):
    """Gated experts: gate and up in blocks or in turn, rows repeated or put back by ids."""

    def __init__(self, turns: bool = False, scattered: bool = False, clamped: bool = False) -> None:
        super().__init__()
        self.turns, self.scattered, self.clamped = turns, scattered, clamped
        self.router = nn.Linear(D, E)
        self.gate_up, self.down = (
            nn.Parameter(torch.randn(E, n, k) / k**0.5) for n, k in ((2 * H, D), (D, H))
        )
        self.gate_up_bias, self.down_bias = (nn.Parameter(0.3 * torch.randn(E, n)) for n in (2 * H, D))

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).sigmoid().topk(TOP, -1)
        ids, tokens = chosen.reshape(-1), torch.arange(x.shape[0]).repeat_interleave(TOP)
        rows = x[tokens]
        inner = torch.bmm(self.gate_up[ids], rows[..., None])[..., 0] + self.gate_up_bias[ids]
        gate, up = (inner[..., ::2], inner[..., 1::2]) if self.turns else inner.chunk(2, -1)
        if self.clamped:
            gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        inner = F.silu(gate) * up
        y = torch.bmm(self.down[ids], inner[..., None])[..., 0] + self.down_bias[ids]
        y = y * shares.reshape(-1, 1)
        if self.scattered:
            return torch.zeros_like(x).index_add(0, tokens, y)
        return y.reshape(-1, TOP, D).sum(1)


class Model(nn.Module):
    """Two blocks on a stream of tokens."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, D), nn.Linear(D, 11, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(D, eps=0.1) for _ in range(3))
        self.blocks = nn.ModuleList(Experts(**options) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.head(self.norms[2](x))


def program_of(**options: bool) -> Program:
    torch.manual_seed(0)
    model = Model(**options).eval()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.add_(0.3 * torch.randn(D))
    return canonicalize(capture(model, (torch.arange(9) % 11,))).program


def hidden_of(spaces: Spaces) -> list[Space]:
    return [space for space in spaces.spaces if space.size == H]


FORMS = {
    "repeated": {},
    "in turn": {"turns": True},
    "put back": {"scattered": True},
    "clamped": {"clamped": True, "turns": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_fold_of_experts_is_exact(form: str, spaces_benchmark: ModuleType) -> None:
    program = spaces_benchmark.widened(program_of(**FORMS[form]))
    ready, folded, gains = spaces_benchmark.prepared(program)
    spaces = analyse(ready)
    assert folded == gains == 3
    (stream,) = (s for s in spaces.spaces if s.size == D)
    assert stream.group == Group.ORTHOGONAL
    # Table, head, and of each block the router, both matrices of all experts and the bias of the second.
    assert len(stream.parameters) == 2 + 2 * 4
    hidden = hidden_of(spaces)
    # Gate, up and down in one space, or as two parts of one parameter.
    assert [s.group for s in hidden] == [Group.PERMUTATION] * 2
    supports = [[a.size for a in spaces.scales.ordered_support(r)] for r in spaces.scales.free_roots()]
    assert sorted(map(sorted, supports)) == ([] if form == "clamped" else [[E, H]] * 2)
    for seed in range(2):
        moved = spaces_benchmark.folded(ready, torch.Generator().manual_seed(seed))
        assert relative_error(program.run_float64(), moved.run_float64()) < 1e-12
        changed = [n for n, held in moved.tensors.items() if not torch.equal(held, ready.tensors[n])]
        assert sum("gate_up" in n or "down" in n for n in changed) == 8


def test_scales_are_balanced_in_each_expert_by_itself() -> None:
    program = program_of()
    name = next(n for n in program.tensors if n.endswith("blocks.0.down"))
    program.tensors[name] = program.tensors[name].clone()
    program.tensors[name][1] *= 100
    balanced = balance_scales(program).program
    norms = balanced.tensors[name].detach().flatten(1).norm(dim=1)
    assert float(norms.max() / norms.min()) < 15
    assert relative_error(program.run_float64(), balanced.run_float64()) < 2e-5


def test_a_weight_of_two_choices_has_one_scale() -> None:
    """Rows that chose by other ids read the same experts: nothing then says which expert a channel's scale is of."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(E, n, k)) for n, k in ((H, D), (D, H)))

        def forward(self, x: Tensor) -> Tensor:
            total = x
            for ids in (x[:, :E].argmax(-1), x[:, :E].argmin(-1)):
                inner = torch.bmm(self.up[ids], x[..., None])[..., 0]
                total = total + torch.bmm(self.down[ids], F.relu(inner)[..., None])[..., 0]
            return total

    spaces = analyse(canonicalize(capture(Twice(), (torch.randn(5, D),))).program)
    supports = [[a.size for a in spaces.scales.ordered_support(r)] for r in spaces.scales.free_roots()]
    assert supports == [[H]]


@pytest.mark.parametrize("form", ["repeated", "clamped"])
def test_hidden_channels_that_contribute_nothing_go(form: str) -> None:
    program = program_of(**FORMS[form])
    with torch.no_grad():
        for name, held in program.tensors.items():
            if name.endswith("blocks.0.down"):
                held[:, :, 2] = 0
            elif name.endswith("blocks.1.down"):
                held[0, :, 4] = 0  # the other experts still read it
    spaces = analyse(program)
    first, second = hidden_of(spaces)
    assert reason_against(spaces, first) is None
    dead = dead_indices(spaces, [first, second])
    assert dead[first.name].nonzero().flatten().tolist() == [2]
    assert not bool(dead[second.name].any())
    editor = Editor(program)
    remove(editor, spaces, {first.name: ~dead[first.name]})
    smaller = editor.finish()
    shapes = {tuple(held.shape) for held in smaller.tensors.values() if held.dim() == 3}
    assert (E, 2 * H - 2, D) in shapes
    assert relative_error(program.run_float64(), smaller.run_float64()) < 1e-12


def test_random_orders_move_all_experts() -> None:
    spaces = analyse(program_of())
    orders = sample.random_orders(spaces, torch.Generator().manual_seed(0))
    for space in hidden_of(spaces):
        assert space.name in orders
        held = {str(member.node.target).rsplit(".", 1)[-1] for member in space.parameters}
        assert held == {"gate_up", "gate_up_bias", "down"}
