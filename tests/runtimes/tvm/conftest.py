"""The op library under TVM's runtime, without a model around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isofold.compiler.capture import capture
from isofold.compiler.errors import ToolchainError
from isofold.compiler.program import Program
from isofold.compiler.tensor_file import read_tensors, write_tensors
from isofold.runtimes.tuning.machines import Comparison, compared
from isofold.runtimes.tvm import tune_cpu
from isofold.runtimes.tvm.artefact import weight_entries
from isofold.runtimes.tvm.compile_cpu import compile_library, cpu_target
from isofold.runtimes.tvm.executor import Executor
from isofold.runtimes.tvm.library import host_objects
from isofold.runtimes.tvm.lower import lower


@pytest.fixture
def invented_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates run, and their times are these: the first of a batch takes 0.9 of the default's, the others 1.1."""

    def known(answer: dict[str, Any]) -> list[Comparison | str]:
        factors = [1.0, 1.0, 0.9, *[1.1] * len(answer["seconds"])]
        seconds = [
            [1e-4 * factor] * len(times) for factor, times in zip(factors, answer["seconds"], strict=False)
        ]
        return compared({**answer, "seconds": seconds})

    monkeypatch.setattr(tune_cpu, "compared", known)


class Negative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


@pytest.fixture(scope="session")
def objects() -> None:
    try:
        host_objects()
    except ToolchainError as error:
        pytest.skip(f"the op library cannot be built here: {error}")


@pytest.fixture(scope="session")
def execute(objects: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Executor]:
    """Compile a program into an executor."""

    def made(program: Program) -> Executor:
        folder: Path = tmp_path_factory.mktemp("executable")
        lowered = lower(program)
        with (folder / "weights.safetensors").open("wb") as file:
            write_tensors(file, weight_entries(program, lowered))
        compile_library(lowered.module, cpu_target("tvm-cpu"), folder / "model.so")
        return Executor(folder / "model.so", read_tensors(folder / "weights.safetensors"))

    return made


@pytest.fixture(scope="session")
def host(execute: Callable[..., Executor]) -> Any:
    """An executor whose op library is called directly."""
    return execute(capture(Negative(), (torch.ones(3),), None, None))
