"""The README's Python and its commands run as they stand, one after the other, in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from isofold import capture
from isofold.compiler.cli import app
from isofold.compiler.errors import ToolchainError
from isofold.runtimes.onnx.oplib.build import build

from ..conftest import ROOT


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(64, 128), nn.Linear(128, 128)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(self.embedding(input_ids)) * attention_mask[..., None]


def test_everything_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        build()
    except ToolchainError as error:
        pytest.skip(f"the op library cannot be built here: {error}")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    torch.manual_seed(0)
    ids, mask = torch.arange(6)[None], torch.ones(1, 6)
    module = Tiny()
    scope: dict[str, object] = {"module": module, "input_ids": ids, "attention_mask": mask}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, scope)
    expected = module(ids, mask).detach().numpy()
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    (plain,) = scope["session"].run(None, feed)  # type: ignore[attr-defined]  # the README's last line makes it
    assert np.abs(plain - expected).max() < 0.05 * np.abs(expected).max()

    capture(module, (ids, mask)).save("model.pt2")
    np.savez("inputs.npz", **feed)
    lines = re.findall(r"^(isofold (?!--help).*)$", text.split("## On the command line")[1], re.M)
    assert len(lines) == 4
    for line in lines:
        words = [*shlex.split(line)[1:], *(["--force"] if "compile" in line else [])]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    with np.load("outputs.npz") as outputs:
        (through_cli,) = outputs.values()
    np.testing.assert_array_equal(through_cli, plain)
    check_json()


def check_json() -> None:
    page = (ROOT / "docs/command-line.md").read_text()
    rows = dict(re.findall(r"^\| (`\w+`(?: of an? \w+)?) \| (.*) \|$", page.split("## JSON")[1], re.M))
    for name, words in (
        ("`run`", "run artefact"),
        ("`bench`", "bench artefact --seconds 0.1"),
        ("`inspect` of a model", "inspect model.pt2"),
        ("`inspect` of an artefact", "inspect artefact"),
        ("`build`", "build"),
        ("`tune`", "tune --merge /dev/null --database tuned.jsonl"),
    ):
        done = CliRunner().invoke(app, [*words.split(), "--json"])
        assert done.exit_code == 0, done.output
        value = json.loads(done.stdout)
        keys = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", rows[name]))
        assert set(keys) <= set(value[0] if isinstance(value, list) else value), name
    report = json.loads(Path("artefact/report.json").read_text())
    (text,) = re.findall(r"^The report .*? has (.*?)\.$", page, re.M | re.S)
    assert set(re.findall(r"`(\w+)`", text)) <= set(report)
