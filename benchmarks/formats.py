"""Every packed format of weights against our own int4, one token, cold weights, beside the read bandwidth.

    python benchmarks/formats.py [--json FILE] [--quick] [--threads 1] [--format TEXT]

GEMV, K = N = 4096, inside ONNX Runtime: models of many layers (as in linears.py) whose weights exceed the L3 cache, one
activation quantizer for all of them. Three figures for each format: microseconds a layer; the share of the read
bandwidth, a plain loop over the very file of its weights in the same rounds; and the rate against int4 with the
same groups. *In the cache* is the rate at which one small layer is computed when nothing comes from memory: where that
exceeds the bandwidth, memory is the limit, and where it does not, arithmetic is.

A new format is a row of FORMATS; `linear_models.py` writes its nodes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import (
    HERE,
    BenchmarkError,
    Results,
    Worker,
    bandwidth_by_round,
    cold_bytes,
    interleave,
    main,
    parse,
    per_round,
    ratios,
    read_workers,
)
from linear_models import Kind, write
from linears import check, library
from subjects import subject_folder

SIZE = 4096
CACHED = (1024, 4096)
"""(N, K) of the two layers that stay in the caches."""
WITHIN = ">= 0.833"
"""Within 20 % of bytes / bandwidth."""


@dataclass(frozen=True)
class Format:
    """A row of the table. rival: what it is compared with; share, faster: bars of its share of the bandwidth and of the
    comparison."""

    kind: Kind
    rival: Kind | None = None
    share: str | None = None
    faster: str | None = None


def _integers(bits: int, group: int, zero: bool = False, floating: bool = False) -> Kind:
    """Integer codes in groups."""
    name = f"int{bits} g{group}{', zero points' if zero else ''}{', float activations' if floating else ''}"
    return Kind(name, "isofold", bits, group, 0, floating, shared_quantizer=True, zero=zero)


def _coded(name: str, bits: int, group: int) -> Kind:
    """Codes of a table or of small floats, or codebooks; their activations are float."""
    return Kind(name, "isofold", bits, group, 0, True, format=name)


INT8 = _integers(8, 0)


def _int4_with(what: str, group: int = 32, shared: bool = True, **more: Any) -> Kind:
    """int4 in groups with something beside it."""
    return Kind(f"int4 g{group}{what}", "isofold", 4, group, shared_quantizer=shared, **more)


INT4 = {group: _integers(4, group) for group in (32, 64, 128)}
INT4_FLOAT = _integers(4, 32, floating=True)
INT4_OWN = _int4_with(", own quantizer", shared=False)
COSTS_15, COSTS_10 = f">= {1 / 1.15:.3f}", f">= {1 / 1.1:.3f}"
"""A format that may cost 15 % or 10 % over its rival."""
FORMATS = [
    *(Format(kind) for kind in INT4.values()),
    *(Format(_integers(3, group), INT4[group], WITHIN) for group in INT4),
    Format(_integers(3, 32, zero=True), INT4[32], WITHIN),
    *(Format(_integers(2, group), INT4[group], WITHIN, ">= 1.5") for group in INT4),
    Format(_integers(2, 32, zero=True), INT4[32], WITHIN, ">= 1.5"),
    Format(_int4_with(", 1 % outliers", outliers=0.01), INT4[32], None, COSTS_15),
    Format(_int4_with(", 1 % outliers", 128, outliers=0.01), INT4[128], None, COSTS_15),
    Format(_int4_with(", rank 8", rank=8), INT4[32], None, COSTS_10),
    Format(INT4_OWN),
    Format(
        _int4_with(", own quantizer with Hadamard 4096", shared=False, hadamard=True),
        INT4_OWN,
        None,
        COSTS_10,
    ),
    Format(INT4_FLOAT),
    Format(
        _int4_with(", float activations, 1 % outliers", outliers=0.01, float_activations=True), INT4_FLOAT
    ),
    Format(_integers(3, 32, zero=True, floating=True), INT4_FLOAT),
    Format(_integers(2, 32, zero=True, floating=True), INT4_FLOAT),
    Format(_coded("nf4", 4, 64), INT4_FLOAT, WITHIN),
    Format(_coded("mxfp4", 4, 32), INT4_FLOAT),
    Format(_coded("nvfp4", 4, 16), INT4_FLOAT),
    Format(_coded("mxfp6_e2m3", 6, 32), INT4_FLOAT),
    Format(_coded("e4m3", 8, 0), INT4_FLOAT),
    Format(_coded("e5m2", 8, 0), INT4_FLOAT),
    Format(INT8),
    Format(Kind("e4m3 g0, FP8 activations", "isofold", 8, 0, format="e4m3", fp8_activations=True), INT8),
    Format(_coded("2x8", 2, 8), INT4_FLOAT, WITHIN),
    Format(_coded("1x8", 1, 8), INT4_FLOAT),
    Format(_coded("1x16", 2, 8), INT4_FLOAT),
]


def _open(kind: Kind, n: int, k: int, layers: int, threads: int, folder: Path) -> tuple[Worker, Path, float]:
    """A worker on a model of this kind, checked against float64; its weights and their bytes a layer."""
    path, total = write(kind, 1, n, k, layers, folder)
    x = np.random.default_rng(1).standard_normal((1, k)).astype(np.float32)
    inputs = folder / f"x-k{k}.npz"
    np.savez(inputs, x=x)
    spec = {
        "engine": "onnxruntime",
        "model": str(path),
        "inputs": str(inputs),
        "threads": threads,
        "optimize": "ORT_DISABLE_ALL",
        "library": library(),
    }
    worker = Worker(f"{kind.name}{'' if layers > 2 else ', in the cache'}", spec)
    check(worker, kind, x, n, k, folder)
    return worker, path.with_suffix(".bin"), total / layers


def measure(results: Results, formats: Sequence[Format], threads: int, rounds: int) -> None:
    """One interleaved run of formats, and its rows."""
    source = hashlib.sha256((HERE / "linear_models.py").read_bytes()).hexdigest()
    folder = subject_folder("formats", str(SIZE), source)
    workers: list[Worker] = []
    weights: dict[str, Path] = {}
    size: dict[str, float] = {}
    layers: dict[str, int] = {}
    try:
        for kind in (form.kind for form in formats):
            layers[kind.name] = int(np.ceil(cold_bytes() / (SIZE * SIZE * kind.bits / 8)))
            worker, weights[kind.name], size[kind.name] = _open(
                kind, SIZE, SIZE, layers[kind.name], threads, folder
            )
            workers += [worker, *read_workers(threads, weights[kind.name])]
            workers.append(_open(kind, *CACHED, 2, threads, folder)[0])
        runs = {worker.name: 20 if worker.name.endswith("in the cache") else 3 for worker in workers}
        seconds = interleave(workers, rounds, runs)
    finally:
        for worker in workers:
            worker.close()
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    per_layer = {name: [[t / layers[name] for t in turn] for turn in seconds[name]] for name in layers}
    for form in formats:
        name = form.kind.name
        times = per_round(per_layer[name])
        bandwidth = bandwidth_by_round(seconds, weights[name])
        results.add(f"{name}: bits a weight, all told", 8 * size[name] / SIZE**2, "bits")
        results.sampled(f"{name}, {where}", [1e6 * t for t in times], "us")
        share = [size[name] / t / b for t, b in zip(times, bandwidth, strict=True)]
        results.sampled(f"{name}, {where}: of the read bandwidth", share, "x", form.share)
        # Two layers of N x K; what a node costs by itself is in this figure.
        small = 2 * size[name] * CACHED[0] * CACHED[1] / SIZE**2
        cached = [
            small / t / b for t, b in zip(per_round(seconds[f"{name}, in the cache"]), bandwidth, strict=True)
        ]
        results.sampled(f"{name}, {where}: rate in the cache, of the read bandwidth", cached, "x")
    for form in formats:
        name = form.kind.name
        if form.rival is not None and form.rival.name in per_layer:
            speedup = ratios(per_layer[form.rival.name], per_layer[name])
            results.sampled(f"{name}, {where}: against {form.rival.name}", speedup, "x", form.faster)


def body() -> int:
    """Build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--threads", type=int, choices=(1, 2), action="append", help="only this many threads"
        )
        parser.add_argument(
            "--format",
            metavar="TEXT",
            action="append",
            help="only formats whose names hold this (and their rivals)",
        )

    arguments = parse(__doc__, extra)
    wanted = [form for form in FORMATS if any(text in form.kind.name for text in arguments.format or [""])]
    rivals = {form.rival.name for form in wanted if form.rival is not None}
    chosen = [form for form in FORMATS if form in wanted or form.kind.name in rivals]
    if not chosen:
        raise BenchmarkError(
            "no format has this in its name: " + ", ".join(form.kind.name for form in FORMATS)
        )
    if arguments.quick and not arguments.format:
        chosen = [form for form in chosen if form.kind.group == 32 and not form.kind.float_activations]
    results = Results("formats")
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        # A run for each rival: fewer processes at a time.
        for rival in (form for form in chosen if form.rival is None):
            together = [rival, *(form for form in chosen if form.rival == rival.kind)]
            measure(results, together, threads, 5 if arguments.quick else 24)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
