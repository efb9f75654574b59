"""TVM executables on the CPU: equal to the program, and as fast as ONNX Runtime.

    python benchmarks/tvm_cpu.py [--json FILE] [--quick] [--only coverage | bert | llama]

Coverage: every architecture, uncompressed and w4a8, at two shapes, against the program itself. Speed: BERT-base
(sequence 128, batch 1) and one decoding step of a model with the shapes of Llama 1B (4 of its 16 layers, one token),
our TVM artefact against our ONNX artefact with the same recipe, and uncompressed against ONNX Runtime; outputs are
compared before anything is timed. Times of compiling BERT-base (the op library is built already) and of opening an
artefact in a new process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from artefacts import Artefact, compile_to
from harness import BenchmarkError, Results, Worker, interleave, main, parse, per_round, ratios
from subjects import SEED, bert_base, bert_onnx

QUICK = ("bert", "llama", "mamba2", "whisper", "hifigan", "resnet")
FLOAT32 = "ONNX Runtime float32"
UNCHECKED: dict[str, Any] = {"verify": False, "measure": False, "check": False}
"""Options for models of which the reference decoder takes minutes to check: here outputs are compared anyway."""
ROUNDING, CODES = 1e-4, 0.2
"""Largest difference to the program: sums in another order; codes that round the other way, amplified by few bits."""

START = """
import sys, time
begin = time.perf_counter()
import isofold
model = isofold.load(sys.argv[1])
model.run(model.examples())
print(time.perf_counter() - begin)
"""


def coverage(results: Results, quick: bool) -> None:
    """Largest difference to the program at the example's and another shape."""
    import torch

    from isofold.compiler.differences import relative_difference, rounds_activations
    from isofold.compiler.frontend import prepare
    from isofold.models import registry
    from isofold.runtimes.tvm.artefact import write_artefact
    from isofold.runtimes.tvm.session import open_artefact

    for name in QUICK if quick else registry.names():
        for recipe in ("float32", "w4a8"):
            case = registry.get(name)
            program = prepare(
                case.module, case.args, recipe=recipe, dynamic_shapes=case.dynamic_shapes, dense=True
            ).program
            with tempfile.TemporaryDirectory() as folder:
                facts = write_artefact(program, Path(folder), target="tvm-cpu", report={})
                model = open_artefact(folder)
                worst = 0.0
                for args in (case.args, case.other_args):
                    with torch.no_grad():
                        want = program(*args)
                    worst = max(worst, relative_difference([want.numpy()], [model(*args).numpy()]))
            bound = CODES if rounds_activations(program) else ROUNDING
            slow = sum(map(len, facts["fallbacks"].values()))
            results.add(f"{name} {recipe}: difference to the program", worst, "", f"<= {bound:g}")
            results.add(f"{name} {recipe}: operators known to be slow", slow, "", "<= 0")


def llama_step() -> tuple[Any, dict[str, Any]]:
    """A language model with the shapes of Llama 1B, 4 layers, and one token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from isofold.models.decoder import causal_language_model
    from isofold.models.llama import SIZES

    config = LlamaConfig(**{**SIZES["base"], "num_hidden_layers": 4, "vocab_size": 32000})
    case = causal_language_model("llama", LlamaForCausalLM, config, "sdpa", SEED)
    return case.module, {"input_ids": torch.tensor([[7]])}


def float32_onnx(module: Any, feeds: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """A module as float32 ONNX by torch.onnx alone, and its inputs."""
    import warnings

    import torch

    path, inputs = folder / "float32.onnx", folder / "inputs.npz"
    if path.exists() and inputs.exists():
        return path, inputs
    np.savez(inputs, **{name: value.numpy() for name, value in feeds.items()})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (), kwargs=feeds, dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    program.save(str(path), external_data=True)
    return path, inputs


def outputs(worker: Worker, folder: Path) -> np.ndarray:
    """The first output of a worker's model."""
    file = folder / "outputs.npz"
    worker.ask({"do": "outputs", "file": str(file)})
    worker.stop()
    with np.load(file) as arrays:
        result: np.ndarray = arrays["arr_0"].astype(np.float64)
    return result


def artefacts(
    results: Results, label: str, module: Any, feeds: dict[str, Any], folder: Path
) -> dict[str, Artefact]:
    """Ours by name; those that are in the folder already are taken as they are."""
    ours: dict[str, Artefact] = {}
    bert = label.startswith("BERT")
    options: dict[str, Any] = {} if bert else UNCHECKED
    for recipe in ("float32", "w8a8", "w4a8"):
        place = folder / f"tvm-{recipe}"
        if place.exists():
            ours[f"TVM {recipe}"] = Artefact(place, place, None)
        else:
            begin = time.perf_counter()
            ours[f"TVM {recipe}"] = compile_to(
                place, module, recipe, kwargs=feeds, target="tvm-cpu", **options
            )
            spent = time.perf_counter() - begin
            what = "compile" if bert else "compile, unchecked"
            results.add(f"{label} {recipe}: {what}", spent, "s", "<= 60" if bert else None)
        place = folder / f"onnx-{recipe}"
        if place.exists():
            ours[f"ONNX {recipe}"] = Artefact(place, place / "model.onnx", None)
        elif recipe != "float32":
            ours[f"ONNX {recipe}"] = compile_to(place, module, recipe, kwargs=feeds, **options)
    return ours


def speed(
    results: Results, label: str, module: Any, feeds: dict[str, Any], float32: tuple[Path, Path],
    arguments: argparse.Namespace, folder: Path,
) -> None:  # fmt: skip
    """One interleaved run of every pair."""
    path, inputs = float32
    threads = 1 if arguments.cpu_time else 2
    ours = artefacts(results, label, module, feeds, folder)
    if arguments.compile_only:
        return
    for recipe in ("float32", "w4a8"):
        command = [sys.executable, "-c", START, str(ours[f"TVM {recipe}"].folder)]
        spent = min(
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(3)
        )
        results.add(f"{label} {recipe}: import, open and first run in a new process", spent, "s", "<= 1")
    workers: list[Worker] = []
    try:
        spec = {"engine": "onnxruntime", "model": str(path), "threads": threads, "inputs": str(inputs)}
        workers.append(Worker(FLOAT32, spec))
        workers.extend(Worker(name, artefact.spec(threads, inputs)) for name, artefact in ours.items())
        found = {worker.name: outputs(worker, folder) for worker in workers}
        pairs = [
            ("TVM float32", FLOAT32, 1.25),
            ("TVM w8a8", "ONNX w8a8", 1.1),
            ("TVM w4a8", "ONNX w4a8", 1.1),
        ]
        for one, other, _ in pairs:
            scale = np.abs(found[other]).max()
            difference = float(np.abs(found[one] - found[other]).max() / scale)
            results.add(f"{label}: {one} differs from {other}", difference, "")
            if not difference <= CODES:
                raise BenchmarkError(f"{one} computes something else than {other}: {difference:.3f}")
        seconds = interleave(workers, 4 if arguments.quick else 24, {worker.name: 3 for worker in workers})
    finally:
        for worker in workers:
            worker.close()
    title = f"{label}, {threads} thread{'s' if threads > 1 else ''}"
    for name, times in seconds.items():
        results.sampled(f"{title}: {name}", [1e3 * t for t in per_round(times)], "ms")
    for one, other, most in pairs:
        results.sampled(
            f"{title}: {one} over {other}", ratios(seconds[one], seconds[other]), "x time", f"<= {most}"
        )


def body() -> int:
    """Compile, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", choices=("coverage", "bert", "llama"), action="append")
        parser.add_argument(
            "--artefacts", metavar="FOLDER", help="keep compiled artefacts here and reuse them"
        )
        parser.add_argument(
            "--compile-only", action="store_true", help="compile into --artefacts, time nothing"
        )

    arguments = parse(__doc__, extra)
    wanted = arguments.only or ["coverage", "bert", "llama"]
    results = Results("tvm_cpu")
    with tempfile.TemporaryDirectory(prefix="isofold-tvm-") as temporary:
        folder = Path(arguments.artefacts or temporary)
        if "bert" in wanted:
            (folder / "bert").mkdir(parents=True, exist_ok=True)
            module, feeds = bert_base()
            speed(results, "BERT-base", module, feeds, bert_onnx(), arguments, folder / "bert")
        if "llama" in wanted:
            (folder / "llama").mkdir(parents=True, exist_ok=True)
            module, feeds = llama_step()
            float32 = float32_onnx(module, feeds, folder / "llama")
            speed(results, "Llama step", module, feeds, float32, arguments, folder / "llama")
        if "coverage" in wanted:
            coverage(results, arguments.quick)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
