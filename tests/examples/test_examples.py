"""The examples run as their first lines say, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What calibrate_your_own_module.py writes and prints."""
    folder = tmp_path_factory.mktemp("examples") / "classifier"
    return folder, run("calibrate_your_own_module.py", str(folder))


def test_compile_transformers_model(tmp_path: Path) -> None:
    text = run("compile_transformers_model.py", str(tmp_path / "llama"))
    cosine = re.search(r"cosine to PyTorch (\S+),", text)
    assert cosine is not None
    assert float(cosine[1]) > 0.95
    before, after = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+)(?= ->| bytes)", text))
    assert after < before / 5


def test_calibrate_your_own_module(artefact: tuple[Path, str]) -> None:
    _, text = artefact
    assert text.count("error 0.00") == 2, "the head keeps its float weights"
    assert "head:" not in text
    same = re.search(r"same class for (\d+) of 32", text)
    assert same is not None
    assert int(same[1]) >= 30


def test_open_with_onnxruntime(artefact: tuple[Path, str]) -> None:
    assert "output: float32 [32, 10]" in run("open_with_onnxruntime.py", str(artefact[0]))


def test_decode_with_coded_caches(tmp_path: Path) -> None:
    text = run("decode_with_coded_caches.py", str(tmp_path / "decoder"))
    held, floats = map(int, re.findall(r"\d+", text.splitlines()[0])[1:])
    assert held < 0.2 * floats
    assert len(re.findall(r"\d+", text.splitlines()[1])) == 11


def test_opening_needs_neither_torch_nor_isofold() -> None:
    source = (EXAMPLES / "open_with_onnxruntime.py").read_text()
    assert set(re.findall(r"^import (\w+)", source, re.M)) == {"sys", "numpy", "onnxruntime"}
