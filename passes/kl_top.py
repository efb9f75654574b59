"""The loss that transforms are learned with: outputs of the quantized program against those of the original.

Logits over a vocabulary: the divergence over the teacher's k most likely tokens ("KL-Top", OSTQuant, arXiv
2501.13987),

    sum_{i in top-k of p} p_i (log p_i - log q_i),   p, q = softmax over the whole vocabulary,

mean over tokens. The tail of a distribution, where the teacher itself is noise, does not steer. It is not a
divergence in the strict sense: what lies outside the top k is left out, so it may fall below 0 by at most the
mass that the teacher has there.

Hidden states, embeddings, waveforms: the squared error relative to the teacher's, |y - t|^2 / |t|^2.

Which of the two an output takes is read off the graph: logits are outputs with one channel for each row of an
embedding table that ids index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.graph import argument, calls, dtype, shape
from ..compiler.program import Program

aten = torch.ops.aten

TOP = 1000

_SAME_IDS = (
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.unsqueeze.default,
)


def kl_top(student: Tensor, teacher: Tensor, k: int = TOP) -> Tensor:
    """The divergence over the teacher's top k, a scalar; logits `[tokens..., vocabulary]`."""
    log_p, log_q = F.log_softmax(teacher.detach().float(), -1), F.log_softmax(student.float(), -1)
    best, ids = log_p.topk(min(k, log_p.shape[-1]), -1)
    return (best.exp() * (best - log_q.gather(-1, ids))).sum(-1).mean()


def relative_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2, a scalar (0 teacher: the plain square)."""
    power = teacher.detach().square().sum()
    return (student - teacher.detach()).square().sum() / torch.where(power > 0, power, torch.ones_like(power))


def vocabulary_outputs(program: Program) -> list[bool]:
    """For each output of `program`, whether it is logits over the vocabulary of its ids."""
    sizes = set()
    for node in calls(program.graph, aten.embedding.default):
        table = shape(argument(node, "weight"))
        if table is not None and _is_given(argument(node, "indices")):
            sizes.add(table[0])
    found = []
    for node in program.outputs:
        sized, kind = shape(node), dtype(node)
        is_float = kind is not None and kind.is_floating_point
        last = sized[-1] if sized else None
        found.append(is_float and isinstance(last, int) and last in sizes)
    return found


def _is_given(ids: fx.Node) -> bool:
    """Whether ids are an input of the program (positions are computed, or constants)."""
    while ids.op == "call_function" and ids.target in _SAME_IDS:
        ids = ids.all_input_nodes[0]
    return ids.op == "placeholder"


def loss_against(program: Program, k: int = TOP) -> Callable[[Sequence[object], Sequence[object]], Tensor]:
    """`loss(student outputs, teacher outputs)` for flat outputs of `program`: mean over its float outputs."""
    logits = vocabulary_outputs(program)

    def loss(student: Sequence[object], teacher: Sequence[object]) -> Tensor:
        parts = []
        for is_logits, a, b in zip(logits, student, teacher, strict=True):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
                parts.append(kl_top(a, b, k) if is_logits else relative_squared_error(a, b))
        return torch.stack(parts).mean()

    return loss
