"""Models of half precision: computed in float32, called with what they were captured with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isofold import compile as isofold_compile
from isofold.compiler.capture import capture
from isofold.compiler.driver import relative_error
from isofold.passes.widen_halves import has_halves, widen_halves


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x) + torch.ones(64, dtype=x.dtype)
        return y.float().softmax(-1).to(x.dtype), ids + 1


def example(kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 64).to(kind), torch.arange(3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_and_types_are_widened_exactly(kind: torch.dtype) -> None:
    program = capture(Scaled().to(kind), example(kind))
    assert has_halves(program)
    wide = widen_halves(program).program
    assert {t.dtype for t in wide.parameters.values()} == {torch.float32}
    assert relative_error(program.run_float64(), wide.run_float64()) == 0
    result, ids = wide(*wide.example_args)
    assert result.dtype == (torch.float16 if kind == torch.float16 else torch.float32)
    assert ids.dtype == torch.int64
    assert has_halves(wide) == (kind == torch.float16)  # casts of what goes in and out


def test_bits_of_halves_are_left_alone() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.int16) + 1

    program = capture(Bits(), (torch.randn(4).half(),))
    result = widen_halves(program)
    assert "bits of another type" in result.report.refused[0].reason
    assert has_halves(result.program)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_half_model_is_quantized_and_takes_its_own_tensors(kind: torch.dtype) -> None:
    model, given = Scaled().to(kind), example(kind)
    compiled = isofold_compile(model, given, recipe="w8a8", measure=False)
    assert [row["packed"] is not None for row in compiled.report["layers"]] == [True]
    with torch.no_grad():
        wanted = model(*given)[0].float()
    assert relative_error([wanted], [compiled(*given)[0].float()]) < 0.05
    if kind == torch.bfloat16:
        arrays = given[0].float().numpy(), given[1].numpy()
        assert np.array_equal(compiled(*arrays)[0], compiled(*given)[0].numpy())
