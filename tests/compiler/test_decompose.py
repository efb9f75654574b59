"""Operators in terms of others: values, symbolic sizes, several results, and what torch cannot take apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isofold.compiler.capture import capture
from isofold.compiler.decompose import decompose
from isofold.compiler.driver import relative_error
from isofold.compiler.editor import Editor
from isofold.compiler.graph import place_of


class Several(nn.Module):
    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(x.flatten(0, 1), targets.flatten())
        return loss, F.one_hot(targets, 8), F.prelu(x, torch.tensor(0.2)), *torch.var_mean(x, dim=1)


def test_composite_operators_keep_values_sizes_and_places() -> None:
    batch = torch.export.Dim("batch", min=2, max=9)
    example = (torch.randn(3, 4, 8), torch.randint(0, 8, (3, 4)))
    program = capture(Several(), example, None, ({0: batch}, {0: batch}))
    editor = Editor(program)
    made = {}
    for node in [n for n in editor.graph.nodes if n.op == "call_function"]:
        place = place_of(node).source
        new = decompose(editor, node) or []
        made[str(node.target)] = [str(n.target) for n in new]
        assert all(place_of(n).source == place for n in new)
    assert "aten._log_softmax.default" in made["aten.cross_entropy_loss.default"]
    assert "aten.eq.Tensor" in made["aten.one_hot.default"]
    assert not any("_assert" in name for name in made["aten.one_hot.default"])
    simpler = editor.finish()
    other = (torch.randn(5, 4, 8), torch.randint(0, 8, (5, 4)))
    assert relative_error(program.run_float64(other), simpler.run_float64(other)) < 1e-12


def test_an_operator_that_torch_cannot_take_apart_stays() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    editor = Editor(capture(Plain(), (torch.randn(3),)))
    node = next(n for n in editor.graph.nodes if n.op == "call_function")
    assert decompose(editor, node) is None
    assert node in editor.graph.nodes
