"""The loss against the original program's outputs, and which kind an output takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.program import Program
from isofold.passes.kl_top import kl_top, loss_against, relative_squared_error, vocabulary_outputs


class TwoHeads(nn.Module):
    """Hidden states of width `width` and logits over 40 ids; learned positions for `positions` places."""

    def __init__(self, width: int, positions: int = 16) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(40, width), nn.Embedding(positions, width)
        self.head = nn.Linear(width, 40)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1])
        x = torch.tanh(self.table(ids) + self.places(places))
        return x, self.head(x)


def program(width: int = 8, positions: int = 16) -> Program:
    ids = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    return canonicalize(capture(TwoHeads(width, positions).eval(), (ids,))).program


def test_with_every_token_it_is_the_divergence() -> None:
    a, b = torch.randn(3, 4, 50), torch.randn(3, 4, 50)
    expected = F.kl_div(F.log_softmax(a, -1), F.log_softmax(b, -1), log_target=True, reduction="sum") / 12
    assert torch.allclose(kl_top(a, b, 50), expected, atol=1e-5)
    assert torch.allclose(kl_top(a, b, 1000), expected, atol=1e-5)


def test_only_the_teachers_top_tokens_count() -> None:
    teacher = torch.tensor([[9.0, 8.0, 0.0, 0.0, 0.0, 0.0]])
    tail = teacher.clone()
    # The same mass over the tail, spread differently.
    tail[0, 2:] = torch.log(torch.tensor([3.7, 0.1, 0.1, 0.1]))
    assert abs(float(kl_top(tail, teacher, 2))) < 1e-6
    assert float(kl_top(tail, teacher, 6)) > 1e-5
    swapped = teacher[:, [1, 0, 2, 3, 4, 5]]
    assert float(kl_top(swapped, teacher, 2)) > 0.1


def test_the_gradient_reaches_the_student_only() -> None:
    student, teacher = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9, requires_grad=True)
    (kl_top(student, teacher, 3) + relative_squared_error(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_logits_are_told_from_hidden_states_by_the_table_that_ids_index() -> None:
    assert vocabulary_outputs(program()) == [False, True]
    # As wide as the table of positions: those are not ids that the model is given.
    assert vocabulary_outputs(program(width=24, positions=24)) == [False, True]


def test_the_loss_of_a_program_mixes_both_kinds() -> None:
    p = program()
    loss = loss_against(p, k=5)
    outputs = p(*p.example_args)
    assert abs(loss(outputs, outputs).item()) < 1e-6
    moved = [outputs[0] * 1.1, outputs[1] + torch.randn_like(outputs[1])]
    expected = (relative_squared_error(moved[0], outputs[0]) + kl_top(moved[1], outputs[1], 5)) / 2
    assert torch.allclose(loss(moved, outputs), expected)
    assert abs(float(relative_squared_error(outputs[0] * 1.1, outputs[0])) - 0.01) < 1e-5
