"""A small real language model and its two twins on WikiText-2: perplexity after rounding, by folded transforms.

    python benchmarks/fidelity_lm.py [--json FILE] [--quick] [--model NAME] [--format NAME] [--method NAME] [--seeds N]

The twins compute the same function as the plain model with outlier channels (powers of two moved between gains,
projections and their readers; the residual stream in its own eigenbasis). The program is run as the recipe's passes
leave it before packing (simulated rounding, which packing keeps bit by bit).
Protocol: windows of 256 tokens plus the next
one, no overlap, the first 80,000 tokens of the test text; weights one scale a row, activations dynamic per token,
keys and values per token and head, everything but the head. Calibration and learning use windows of the train text.

Bars: with folding, every twin ends within 2 % of the plain model under the same recipe; at W4A4KV4 each of none, scale,
rotation, learned is better than the one before, and learning closes a third of the gap that the randomised Hadamard
rotation leaves. Needs ../shared/data (ISOFOLD_DATA names another folder).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import HERE, BenchmarkError, Results, main, parse

WINDOW = 256
CALIBRATION, LEARNING = 16, 96
"""Batches of 8 windows that statistics come from, and that learning goes through."""
MODELS = ("plain", "twin-gains", "twin-basis")
FORMATS: dict[str, tuple[int, int | None]] = {
    "w4a16": (16, None),
    "w4a8": (8, None),
    "w4a4": (4, None),
    "w4a4kv4": (4, 4),
}
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "smoothquant": {"scale": "smoothquant"},
    "osplus": {"scale": "osplus", "shift": "osplus"},
    "awq": {"scale": "awq"},
    "hadamard": {"rotation": "hadamard"},
    "womi": {"rotation": "womi"},
    "learned": {"rotation": "learned", "scale": "learned", "shift": "learned"},
}
SEEDED = ("hadamard", "womi", "learned")


def folder() -> Path:
    """The folder with the models and the text."""
    found = Path(os.environ.get("ISOFOLD_DATA", HERE.parent.parent / "shared" / "data"))
    if not (found / "wikitext2-llama" / "plain").is_dir():
        raise BenchmarkError(
            f"{found} has no wikitext2-llama: put the data there or name its folder in ISOFOLD_DATA"
        )
    return found


def encoded(split: str, characters: int | None = None) -> torch.Tensor:
    """Token ids of a split, as one string; all models share the plain one's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder() / "wikitext2-llama" / "plain")
    text = (folder() / "wikitext-2" / f"{split}.txt").read_text(encoding="utf-8")[:characters]
    return torch.tensor(tokenizer.encode(text))


class Logits(nn.Module):
    """Ids to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 `[batch, sequence]` → `[batch, sequence, vocabulary]`."""
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def captured(name: str) -> Any:
    """The program of one model."""
    import transformers

    import isofold

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder() / "wikitext2-llama" / name, dtype=torch.float32
    )
    batch = torch.export.Dim("batch", min=1, max=64)
    ids = torch.arange(2 * WINDOW).reshape(2, WINDOW) % 512
    return isofold.capture(Logits(model.eval()), (ids,), dynamic_shapes=({0: batch},))


def perplexity(program: Any, ids: torch.Tensor, tokens: int) -> float:
    """exp of the mean negative log-likelihood over windows."""
    windows = torch.stack(
        [ids[at : at + WINDOW + 1] for at in range(0, min(tokens, len(ids) - 1) - WINDOW + 1, WINDOW)]
    )
    total = 0.0
    with torch.no_grad():
        for part in windows.split(8):
            logits = program(part[:, :-1])
            total += float(
                nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
    return math.exp(min(total / (len(windows) * WINDOW), 50.0))


def rounded(
    program: Any, form: str, method: str, seed: int, steps: int, calibration: list[Any], solver: str
) -> Any:
    """The program after the recipe's folds and quantizers, not packed."""
    from isofold.compiler.driver import run_steps
    from isofold.compiler.recipe import ActivationFormat, CacheFormat, Fold, LayerRule, Recipe, WeightFormat
    from isofold.passes.pipeline import plan

    bits, cache = FORMATS[form]
    chosen = METHODS[method]
    recipe = Recipe(
        name=f"{form}-{method}",
        weights=WeightFormat(bits=4, group_size=0, solver=solver),  # type: ignore[arg-type]  # one of its words
        activations=ActivationFormat(mode="float")
        if bits == 16
        else ActivationFormat.model_validate({"mode": "dynamic", "bits": bits}),
        kv=None if cache is None else CacheFormat.model_validate({"bits": cache}),
        fold=None if chosen is None else Fold(**chosen, seed=seed, steps=steps),
        layers=[LayerRule(match="*lm_head", weights=None)],
    )
    steps_ = [s for s in plan(program, recipe, calibration) if not s.run.name.startswith(("pack", "fuse"))]
    return run_steps(program, steps_, verify=False)[0]


def body() -> int:
    """Every model, format and method; then the bars."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", choices=MODELS, action="append")
        parser.add_argument("--format", choices=tuple(FORMATS), action="append")
        parser.add_argument("--method", choices=tuple(METHODS), action="append")
        parser.add_argument("--seeds", type=int, default=3, help="of random and learned transforms")
        parser.add_argument("--learned-seeds", type=int, default=None, help="as many as --seeds, or fewer")
        parser.add_argument(
            "--steps", type=int, default=0, help="of learning behind its start, 2,048 tokens each"
        )
        parser.add_argument("--solver", choices=("nearest", "gptq"), default="nearest", help="of all weights")
        parser.add_argument("--tokens", type=int, default=80000)

    arguments = parse(__doc__, extra)
    tokens = min(arguments.tokens, 16000) if arguments.quick else arguments.tokens
    seeds = 1 if arguments.quick else arguments.seeds

    def repeats(method: str) -> int:
        most = seeds if arguments.learned_seeds is None or method != "learned" else arguments.learned_seeds
        return min(most, seeds) if method in SEEDED else 1

    results = Results("fidelity_lm")
    by = "" if arguments.solver == "nearest" else f" {arguments.solver}"
    train, test = encoded("train", 4_000_000), encoded("test")
    windows = train[: len(train) // WINDOW * WINDOW].reshape(-1, WINDOW)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    calibration = [(batch,) for batch in windows.split(8)][: CALIBRATION if arguments.quick else LEARNING]
    found: dict[tuple[str, str, str], float] = {}
    floats: dict[str, float] = {}
    for model in arguments.model or MODELS:
        program = captured(model)
        floats[model] = perplexity(program, test, tokens)
        results.add(f"{model}: float32", floats[model], "ppl")
        for form in arguments.format or FORMATS:
            for method in arguments.method or METHODS:
                started = time.perf_counter()
                samples = []
                for seed in range(repeats(method)):
                    learns = method == "learned" and arguments.steps
                    data = calibration if learns else calibration[:CALIBRATION]
                    student = rounded(program, form, method, seed, arguments.steps, data, arguments.solver)
                    samples.append(perplexity(student, test, tokens))
                found[model, form, method] = statistics.fmean(samples)
                spread = (
                    f", {min(samples):.2f} to {max(samples):.2f} over {len(samples)} seeds"
                    if len(samples) > 1
                    else ""
                )
                results.add(f"{model} {form}{by}: {method}{spread}", found[model, form, method], "ppl")
                print(
                    f"{model} {form}{by} {method}: {samples} ({time.perf_counter() - started:.0f} s)",
                    flush=True,
                )
    _bars(results, found, floats)
    return results.finish(arguments)


def _bars(results: Results, found: dict[tuple[str, str, str], float], floats: dict[str, float]) -> None:
    for (model, form, method), value in found.items():
        plain = found.get(("plain", form, method))
        if (
            model != "plain"
            and plain is not None
            and METHODS[method] is not None
            and "rotation" in (METHODS[method] or {})
        ):
            results.add(f"{model} {form}: {method} over the plain model", value / plain, "x", "<= 1.02")
    for model, base in floats.items():
        row = {
            method: found.get((model, "w4a4kv4", method))
            for method in ("none", "smoothquant", "hadamard", "learned")
        }
        if any(v is None for v in row.values()):
            continue
        none, scale, turned, learned = (float(v) for v in row.values() if v is not None)
        results.add(f"{model} w4a4kv4: scale over none", scale / none, "x", "<= 1")
        results.add(f"{model} w4a4kv4: hadamard over scale", turned / scale, "x", "<= 1")
        results.add(
            f"{model} w4a4kv4: share of hadamard's gap closed by learning",
            (turned - learned) / (turned - base),
            "",
            ">= 0.333",
        )


if __name__ == "__main__":
    main(body)
