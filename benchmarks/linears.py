"""Packed linears against ONNX Runtime's own, cold weights, one node after another inside ONNX Runtime.

    python benchmarks/linears.py [--json FILE] [--quick] [--peers-only]

Every competitor is a session with many layers whose weights together exceed the L3 cache by far
(`harness.cold_bytes`), so each layer comes from memory, as it does in a model. Times are per layer, the activation
quantizer included (ONNX Runtime's operators quantize inside). Bars: W4A8 GEMV at least 1.1 times MatMulNBits at
accuracy level 4 and 85 % of the bandwidth at which a plain loop reads the same mapped weights in the same rounds (the
better of one and four streams); M = 128 at least 2 times.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np

from harness import (
    HERE,
    BenchmarkError,
    Results,
    Worker,
    bandwidth_by_round,
    cold_bytes,
    interleave,
    last_level_cache,
    main,
    parse,
    per_round,
    probe_library,
    ratios,
    read_workers,
)
from linear_models import Kind, reference, write
from subjects import subject_folder

SHAPES = {"4096x4096": (4096, 4096), "1024x3072": (3072, 1024), "3072x1024": (1024, 3072)}
"""Name K x N as the peers' tables write it → (N, K)."""

W4A8 = [Kind(f"isofold w4a8 g{g}", "isofold", 4, g) for g in (32, 128)]
SHARED = [Kind("isofold w4a8 g32, one quantizer", "isofold", 4, 32, shared_quantizer=True)]
W8A8 = Kind("isofold w8a8", "isofold", 8)
FLOAT = [
    Kind("isofold w4a16 g32", "isofold", 4, 32, float_activations=True),
    Kind("isofold w4a16 g128", "isofold", 4, 128, float_activations=True),
    Kind("isofold w8a16", "isofold", 8, float_activations=True),
]
NBITS = {g: Kind(f"MatMulNBits accuracy 4 g{g}", "MatMulNBits", 4, g, accuracy=4) for g in (32, 128)}
NBITS_FLOAT = {g: Kind(f"MatMulNBits float g{g}", "MatMulNBits", 4, g, accuracy=1) for g in (32, 128)}
NBITS8_FLOAT = Kind("MatMulNBits 8 bit float g32", "MatMulNBits", 8, 32, accuracy=1)
DYNAMIC = Kind("DynamicQuantizeMatMul", "DynamicQuantizeMatMul", 8)
FP32 = Kind("MatMul float32", "MatMul", 8)

# The bars name int8 activations; float activations have their own peers and no bar in this issue.
RIVAL: dict[str, Kind] = {
    **{kind.name: NBITS[kind.group] for kind in W4A8},
    W8A8.name: DYNAMIC,
    FLOAT[0].name: NBITS_FLOAT[32],
    FLOAT[1].name: NBITS_FLOAT[128],
    FLOAT[2].name: NBITS8_FLOAT,
}
TOLERANCE = {False: 0.03, True: 1e-3}
"""Relative error to the float64 product by float_activations: 8-bit activations cost about 1 %."""


def _layers(kind: Kind, m: int, n: int, k: int, quick: bool) -> int:
    """Enough layers that weights come from memory (1.25 times the L3 at M = 128, where they are read once per 4
    GFLOP); float32 needs fewer."""
    per_layer = n * k * (4 if kind.operator == "MatMul" else 0.5)
    size = cold_bytes() if m == 1 else 1.25 * last_level_cache()
    return max(2 if quick else 3, int(np.ceil(size / per_layer)))


def library() -> str:
    from isofold.runtimes.onnx.oplib.build import library_path

    return str(library_path())


def check(worker: Worker, kind: Kind, x: np.ndarray, n: int, k: int, folder: Path) -> None:
    """A fast wrong kernel is no result: layer 1 against float64."""
    file = folder / f"outputs-{file_name(worker.name)}.npz"
    worker.ask({"do": "outputs", "file": str(file)})
    worker.stop()
    with np.load(file) as arrays:
        found = arrays["arr_1"]
    file.unlink()
    wanted = reference(x, kind, n, k, 1)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    limit = TOLERANCE[kind.float_activations or kind.operator == "MatMul"]
    if not error < limit:
        raise BenchmarkError(
            f"{kind.name}, N={n} K={k}: relative error {error:.2e} to float64, limit {limit}"
        )


def file_name(name: str) -> str:
    """A file name from a worker's name."""
    return "".join(c if c.isalnum() else "-" for c in name)


def measure(
    results: Results, shape: str, m: int, threads: int, kinds: list[Kind], rounds: int, quick: bool
) -> None:
    """One interleaved run of all kinds on one shape, and its rows."""
    n, k = SHAPES[shape]
    # Files of an older form would be opened by the newer library.
    source = hashlib.sha256((HERE / "linear_models.py").read_bytes()).hexdigest()
    folder = subject_folder("linears", shape, source)
    inputs = folder / f"x-m{m}.npz"
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    np.savez(inputs, x=x)
    workers: list[Worker] = []
    layers: dict[str, int] = {}
    size: dict[str, float] = {}
    weights: dict[str, Path] = {}
    try:
        for kind in kinds:
            layers[kind.name] = _layers(kind, m, n, k, quick)
            path, total = write(kind, m, n, k, layers[kind.name], folder)
            size[kind.name] = total / layers[kind.name]
            weights[kind.name] = path.with_suffix(".bin")
            spec = {
                "engine": "onnxruntime",
                "model": str(path),
                "inputs": str(inputs),
                "threads": threads,
                "optimize": "ORT_DISABLE_ALL",
                "library": library() if kind.ours else None,
            }
            workers.append(Worker(kind.name, spec))
            check(workers[-1], kind, x, n, k, folder)
        for kind in W4A8 if m == 1 else []:
            if kind in kinds:
                workers.extend(read_workers(threads, weights[kind.name]))
        runs = {worker.name: (4 if m == 1 else 1) for worker in workers}
        seconds = interleave(workers, rounds, runs)
    finally:
        for worker in workers:
            worker.close()
    where = f"{shape} M={m}, {threads} thread{'s' if threads > 1 else ''}"
    per_layer = {
        kind.name: [[run / layers[kind.name] for run in turn] for turn in seconds[kind.name]]
        for kind in kinds
    }
    for kind in kinds:
        times = per_round(per_layer[kind.name])
        results.sampled(f"{kind.name}, {where}", [1e6 * t for t in times], "us")
        if m == 1 and kind in W4A8:
            bandwidth = bandwidth_by_round(seconds, weights[kind.name])
            results.sampled(
                f"{kind.name}, {where}: a plain loop over its file", [1e-9 * b for b in bandwidth], "GB/s"
            )
            share = [size[kind.name] / t / b for t, b in zip(times, bandwidth, strict=True)]
            results.sampled(f"{kind.name}, {where}: of the read bandwidth", share, "x", ">= 0.85")
        elif m > 1:
            results.sampled(f"{kind.name}, {where}: rate", [2e-9 * m * n * k / t for t in times], "GOPS")
    for kind in kinds:
        rival = RIVAL.get(kind.name)
        if kind.ours and rival is not None and rival.name in per_layer:
            bar = None if kind not in W4A8 else (">= 1.1" if m == 1 else ">= 2")
            speedup = ratios(per_layer[rival.name], per_layer[kind.name])
            results.sampled(f"{kind.name}, {where}: against {rival.name}", speedup, "x", bar)


def body() -> int:
    """Build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--peers-only", action="store_true", help="leave isofold's own kernels out")
        parser.add_argument(
            "--shape", choices=sorted(SHAPES), action="append", help="only this shape (repeatable)"
        )
        parser.add_argument(
            "--threads", type=int, choices=(1, 2), action="append", help="only this many threads"
        )

    arguments = parse(__doc__, extra)
    results = Results("linears")
    shapes = arguments.shape or (["4096x4096"] if arguments.quick else list(SHAPES))
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        with Worker(
            "vpdpbusd",
            {"engine": "vnni", "probe": str(probe_library()), "rounds": 200000, "threads": threads},
        ) as peak:
            samples = peak.turn(20)
        if min(samples) > 0:
            rates = [200000 * 12 * 128 * threads / s / 1e9 for s in samples]
            results.sampled(f"vpdpbusd alone, {threads} threads", rates, "GOPS")
        for shape in shapes:
            for m in (1, 128):
                ours = [*W4A8, *(SHARED if m == 1 else []), W8A8, *([] if arguments.quick else FLOAT)]
                theirs = [*NBITS.values(), DYNAMIC, FP32]
                if not arguments.quick:
                    theirs += [*NBITS_FLOAT.values(), NBITS8_FLOAT]
                kinds = theirs if arguments.peers_only else ours + theirs
                rounds = (5 if arguments.quick else 24) if m == 1 else (5 if arguments.quick else 8)
                measure(results, shape, m, threads, kinds, rounds, arguments.quick)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
