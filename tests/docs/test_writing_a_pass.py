"""The code in docs/writing-a-pass.md runs, and what the page says of it is true."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isofold import Step, capture
from isofold.compiler.driver import run_steps
from isofold.compiler.errors import VerificationError


@pytest.fixture(scope="module")
def page(root: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (root / "docs/writing-a-pass.md").read_text(), re.S)


@pytest.fixture(scope="module")
def fold(page: list[str]) -> object:
    module = types.ModuleType("docs_pass")
    sys.modules[module.__name__] = module
    exec(page[0], module.__dict__)
    return module.fold_constant_scale


class Scaled(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.linear, self.shared = nn.Linear(4, 3), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y * 3.0 + y if self.shared else y * 3.0


def test_the_page_runs_as_written(page: list[str], fold: object) -> None:
    scope: dict[str, Any] = {
        "model": Scaled(shared=False),
        "x": torch.randn(2, 4),
        "fold_constant_scale": fold,
    }
    exec(page[1], scope)
    targets = [str(n.target) for n in scope["program"].graph.nodes if n.op == "call_function"]
    assert targets == ["aten.linear.default"]
    report = scope["reports"][0]
    assert report.error < 1e-7
    assert [a.what for a in report.applied] == ["scaled by 3.0"]


def test_shared_result_is_refused(fold: object) -> None:
    program = capture(Scaled(shared=True), (torch.randn(2, 4),))
    after, (report,) = run_steps(program, [Step(fold)])  # type: ignore[arg-type]
    assert [r.reason for r in report.refused] == ["the linear has other readers and would be computed twice"]
    assert after.operator_count == program.operator_count


def test_without_the_bias_term_the_driver_raises(page: list[str]) -> None:
    module = types.ModuleType("docs_pass_broken")
    exec(page[0].replace("held.double() * factor", "held.double()"), module.__dict__)
    program = capture(Scaled(shared=False), (torch.randn(2, 4),))
    with pytest.raises(
        VerificationError, match="fold_constant_scale changed the program by more than it guarantees"
    ):
        run_steps(program, [Step(module.fold_constant_scale)])
