"""`isofold.compile(target="cuda:...")` from a model to an artefact, with and without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import isofold
from isofold.compiler.errors import ArtefactError, InputError, ToolchainError

from .test_program import WORDS, Block


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_models_compile_without_a_gpu_and_say_what_running_needs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, WORDS, (1, 4))
    opened = isofold.compile(
        Block().eval(), (ids,), target="cuda:sm_80", recipe="w4a16", output=tmp_path / "artefact"
    )
    facts = opened.report["tvm"]
    assert facts["arch"] == "sm_80"
    assert facts["resources"]
    assert (tmp_path / "artefact" / "report.html").is_file()
    again = isofold.load(tmp_path / "artefact")
    if again.runs_here:
        assert again(ids).shape == (1, 4, WORDS)
    else:
        assert "profile" not in opened.report
        # Compiling left a stand-in for the driver in this process: with it the runtime loads and finds no GPU.
        with pytest.raises(
            (ToolchainError, ArtefactError), match=r"cannot be loaded|cannot open the executable"
        ):
            again(ids)


def test_unknown_architectures_are_refused_before_anything_is_captured() -> None:
    with pytest.raises(InputError, match="Unknown architecture of a CUDA target"):
        isofold.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), target="cuda:sm_20")
