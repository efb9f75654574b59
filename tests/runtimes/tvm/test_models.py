"""Whole models at two shapes: what the executable computes is what the program computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isofold.compiler.differences import relative_difference, rounds_activations
from isofold.compiler.frontend import prepare
from isofold.models import registry
from isofold.runtimes.tvm.artefact import write_artefact
from isofold.runtimes.tvm.session import open_artefact

from ...captured import captured

FAST = [
    ("bert", "w8a8"),
    ("llama", "w4a8"),
    ("resnet", "float32"),
    ("whisper", "float32"),
    ("qwen3_moe", "w4a8"),
    ("bert", "fp8"),
]


def compare(name: str, recipe: str, folder: Path) -> None:
    case, plain = captured(name)
    program = prepare(plain, recipe=recipe, verify=False, dense=True).program
    facts = write_artefact(program, folder, target="tvm-cpu", report={})
    assert facts["fallbacks"] == {}
    assert len(facts["schedules"]) == facts["kernels"]  # none is left to the scalar default
    model = open_artefact(folder)
    for args in (case.args, case.other_args):
        with torch.no_grad():
            want = program(*args)
        got = model(*args)
        # A last bit that moves one code moves the result by much less than rounding does.
        bound = 0.2 if rounds_activations(program) else 2e-5
        assert relative_difference([want.numpy()], [got.numpy()]) < bound


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize(("name", "recipe"), FAST)
def test_models(name: str, recipe: str, tmp_path: Path) -> None:
    compare(name, recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("recipe", ["float32", "w4a8"])
@pytest.mark.parametrize("name", registry.names())
def test_every_model(name: str, recipe: str, tmp_path: Path) -> None:
    compare(name, recipe, tmp_path)
