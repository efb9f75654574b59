"""BERT-base, sequence 128, batch 1: isofold against ONNX Runtime and OpenVINO.

    python benchmarks/peers.py install openvino
    python benchmarks/encoder.py [--json FILE] [--quick] [--profile] [--no-openvino]

One model with seeded random weights (speed only); every competitor gets the same tokens and writes the same
hidden states. Outputs are compared with float32 before anything is timed; those of pruned weights (``sparse80``:
the smallest 80 % of every linear become zero), which are another model's, with stock ONNX Runtime on the same file.
Bars, 2 threads: w8a8 at least as fast as OpenVINO with NNCF's int8 weights and activations; 80 and 90 % zeros in
float32 at least 2.0 and 2.8 times ONNX Runtime's dense float32; 80 % zeros in int8 at least 1.4 times OpenVINO's int8.
``--profile`` shows microseconds by operator of our artefacts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from artefacts import Artefact, compile_to
from harness import (
    BenchmarkError,
    Results,
    Worker,
    bandwidth_by_round,
    interleave,
    main,
    parse,
    per_round,
    ratios,
    read_workers,
)
from peers import interpreter, require
from subjects import bert_base, bert_onnx, onnxruntime_dynamic_int8, openvino_int8

RECIPES = ("w8a8", "w4a8", "sparse80-float32", "sparse90-float32", "sparse80-int8")
FLOAT32 = "ONNX Runtime float32"
DYNAMIC = "ONNX Runtime dynamic int8"
OPENVINO = "OpenVINO NNCF int8"
OPENVINO_FLOAT = "OpenVINO NNCF int8, rest in float32"
BARS = {
    ("isofold w8a8", OPENVINO, 2): ">= 1.0",
    ("isofold sparse80-float32", FLOAT32, 2): ">= 2.0",
    ("isofold sparse90-float32", FLOAT32, 2): ">= 2.8",
    ("isofold sparse80-int8", OPENVINO, 2): ">= 1.4",
}


def _outputs(worker: Worker, folder: Path) -> np.ndarray:
    file = folder / "outputs.npz"
    worker.ask({"do": "outputs", "file": str(file)})
    worker.stop()
    with np.load(file) as arrays:
        result: np.ndarray = arrays["arr_0"].astype(np.float64)
    return result


def _stock(artefact: Artefact, threads: int, inputs: Path, folder: Path) -> np.ndarray:
    """What the functions of standard operators in the file compute, without the op library."""
    with Worker("stock ONNX Runtime", artefact.spec(threads, inputs, library=False)) as worker:
        return _outputs(worker, folder)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest cosine over the tokens."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())


def _compile(folder: Path, recipes: Sequence[str]) -> dict[str, Artefact]:
    """Artefacts by competitor's name; one that is in ``folder`` already is taken as it is."""
    module, feeds = bert_base()
    found = {}
    for recipe in recipes:
        target = folder / recipe
        if target.exists():
            found[f"isofold {recipe}"] = Artefact(target, target / "model.onnx", None)
        else:
            found[f"isofold {recipe}"] = compile_to(target, module, recipe, kwargs=feeds)
    return found


def profile(results: Results, ours: dict[str, Artefact], inputs: Path, threads: int, folder: Path) -> None:
    """Microseconds of one run by operator type, from ONNX Runtime's own profile."""
    for name, artefact in ours.items():
        spec = {**artefact.spec(threads, inputs), "profile": str(folder / "profile")}
        with Worker(name, spec) as worker:
            worker.ask({"do": "time", "n": 3})
            operators = worker.ask({"do": "profile", "n": 20})["operators"]
        for operator, (microseconds, count) in sorted(operators.items(), key=lambda item: -item[1][0]):
            label = f"{name}, {threads} threads, {operator} x {count:.0f}"
            results.add(label, microseconds, "us")


def measure(
    results: Results,
    threads: int,
    ours: dict[str, Artefact],
    arguments: argparse.Namespace,
    folder: Path,
) -> None:
    """One interleaved run of all competitors."""
    float32, inputs = bert_onnx()
    peer = {"inputs": str(inputs), "threads": threads}
    workers: list[Worker] = []
    try:
        for name, path in ((FLOAT32, float32), (DYNAMIC, onnxruntime_dynamic_int8(float32))):
            workers.append(Worker(name, {**peer, "engine": "onnxruntime", "model": str(path)}))
        if not arguments.no_openvino:
            python = require("openvino")
            spec = {**peer, "engine": "openvino", "model": str(openvino_int8(python, float32, inputs))}
            workers.append(Worker(OPENVINO, spec, python))
            workers.append(Worker(OPENVINO_FLOAT, {**spec, "precision": "f32"}, python))
        for name, artefact in ours.items():
            workers.append(Worker(name, artefact.spec(threads, inputs)))
        competitors = [worker.name for worker in workers]
        wanted = _outputs(workers[0], folder)
        for worker in workers[1:]:
            pruned = "sparse" in worker.name
            right = _stock(ours[worker.name], threads, inputs, folder) if pruned else wanted
            cosine = _cosine(_outputs(worker, folder), right)
            results.add(f"{worker.name}, {threads} threads: worst cosine of a token", cosine, "")
            if cosine < (0.99 if pruned else 0.5):
                against = "stock ONNX Runtime" if pruned else "float32"
                raise BenchmarkError(
                    f"{worker.name} computes something else: cosine {cosine:.3f} to {against}"
                )
        readers = read_workers(threads, float32)
        workers.extend(readers)
        runs = {worker.name: 3 for worker in workers}
        seconds = interleave(workers, 4 if arguments.quick else 24, runs)
    finally:
        for worker in workers:
            worker.close()
    title = f"{threads} thread{'s' if threads > 1 else ''}"
    results.sampled(
        f"read bandwidth, {title}", [b / 1e9 for b in bandwidth_by_round(seconds, float32)], "GB/s"
    )
    for name in competitors:
        results.sampled(f"{name}, {title}", [1e3 * t for t in per_round(seconds[name])], "ms")
    for name in ours:
        for rival in competitors:
            if rival not in ours:
                bar = BARS.get((name, rival, threads))
                speedup = ratios(seconds[rival], seconds[name])
                results.sampled(f"{name} against {rival}, {title}", speedup, "x", bar)
    if not ours:
        for name in competitors[1:]:
            speedup = ratios(seconds[FLOAT32], seconds[name])
            results.sampled(f"{name} against {FLOAT32}, {title}", speedup, "x")


def body() -> int:
    """Compile, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--profile", action="store_true", help="only: microseconds by operator of isofold"
        )
        parser.add_argument("--peers-only", action="store_true", help="leave isofold out")
        parser.add_argument("--no-openvino", action="store_true", help="leave OpenVINO out")
        parser.add_argument("--recipe", choices=RECIPES, action="append", help="only this recipe of isofold")
        parser.add_argument(
            "--artefacts", metavar="FOLDER", help="keep compiled artefacts here and reuse them"
        )
        parser.add_argument(
            "--threads", type=int, choices=(1, 2), action="append", help="only this many threads"
        )

    arguments = parse(__doc__, extra)
    if not arguments.no_openvino and not arguments.profile and interpreter("openvino") is None:
        require("openvino")
    results = Results("encoder")
    with tempfile.TemporaryDirectory(prefix="isofold-encoder-") as temporary:
        folder = Path(temporary)
        kept = Path(arguments.artefacts) if arguments.artefacts else folder
        ours = {} if arguments.peers_only else _compile(kept, arguments.recipe or RECIPES)
        for threads in (1,) if arguments.cpu_time else arguments.threads or (2, 1):
            if arguments.profile:
                profile(results, ours, bert_onnx()[1], threads, folder)
            else:
                measure(results, threads, ours, arguments, folder)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
