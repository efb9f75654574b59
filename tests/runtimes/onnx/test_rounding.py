"""Models that simulate the rounding of their activations, through ONNX Runtime with the op library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import isofold
from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.driver import Step, relative_error, run_steps
from isofold.compiler.recipe import PRESETS
from isofold.passes.extract_rounding import extract_rounding


class Rounded(nn.Module):
    """Static codes of eight bits, static ones without the least, and a range for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = ((torch.round(x / 0.03) + 113).clamp(0, 255).to(torch.uint8).float() - 113) * 0.03
        x = F.gelu(self.a(x))
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-20)
        zero = torch.round(-low / scale) - 128
        x = (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale
        x = self.b(x)
        return self.c(torch.round(x / 0.02).clamp(-127, 127) * 0.02)


def test_rounded_activations_run_as_integers(library: str) -> None:
    model, x = Rounded().eval(), 2 * torch.randn(20, 64)
    steps = [Step(canonicalize), Step(extract_rounding, {"recipe": PRESETS["w8a8"]})]
    program, reports = run_steps(capture(model, (x,)), steps)
    assert [entry.facts["exact"] for entry in reports[1].applied] == [True, True, True]
    compiled = isofold.compile(program, recipe="w8a8", measure=False)
    packed = next(p for p in compiled.report["passes"] if p["pass"] == "pack_linears")
    assert [entry["activations"] for entry in packed["applied"]] == ["uint8"] * 3
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
    assert relative_error([model(x)], [torch.as_tensor(compiled(x))]) < 0.03  # of int8 weights
