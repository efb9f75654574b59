"""Whole models: uncompressed equal to PyTorch, compressed equal with and without the op library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isofold.compiler.differences import relative_difference
from isofold.compiler.driver import run_steps
from isofold.compiler.recipe import resolve
from isofold.compiler.registry import pipeline
from isofold.runtimes.onnx.export import export_onnx
from isofold.runtimes.onnx.session import open_session

from ...captured import captured


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_uncompressed_models_equal_pytorch_at_other_sizes(name: str, tmp_path: Path) -> None:
    case, program = captured(name)
    export_onnx(program, tmp_path / "m.onnx", "m.data")
    session = open_session(tmp_path / "m.onnx", library=None)
    for args in (case.args, case.other_args):
        with torch.no_grad():
            want = case.module(*args)
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, {n: a.numpy() for n, a in zip(names, args, strict=True)})
        assert relative_difference([want.numpy()], got) < 1e-4


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("bert", "w8a8"),
        ("llama", "w8a8"),
        ("bert", "w4a4"),
        ("llama", "w4a4kv4"),
        ("llama", "w2a8"),
        ("bert", "w3a8"),
        ("bert", "w2a16"),
        ("llama", "w4-nf4"),
        ("bert", "w8-fp8"),
        ("llama", "fp8"),
        ("llama", "w4-mxfp4"),
        ("llama", "w2-codebook"),
        ("qwen3_moe", "w4a8"),
        ("gpt_oss", "w8a8"),
    ],
)
def test_compressed_models_agree_with_and_without_the_library(
    name: str, recipe: str, tmp_path: Path, library: str
) -> None:
    case, plain = captured(name)
    program, _ = run_steps(plain, pipeline()(plain, resolve(recipe), None, False), verify=False)
    export_onnx(program, tmp_path / "m.onnx", "m.data")
    feed = dict(
        zip([p.name for p in program.placeholders], (a.numpy() for a in case.other_args), strict=True)
    )
    with torch.no_grad():
        want = program(*case.other_args).numpy()
    for chosen in (None, Path(library)):
        got = open_session(tmp_path / "m.onnx", library=chosen).run(None, feed)
        assert np.isfinite(got[0]).all()
        # A last bit that moves one code moves the result by much less than rounding does.
        assert relative_difference([want], got) < (0.02 if recipe == "w8a8" else 0.2)
        # Most tokens see no such bit at all, whatever the width.
        assert np.median(np.abs(want - got[0])) < 1e-4 * np.abs(want).max()
