"""The op library with tuned knobs against the same with shipped and with default ones, cold weights, in ONNX Runtime.

    python benchmarks/tuning.py [--json FILE] [--quick] [--tune 10m] [--shape KxN] [--threads 1]

Every competitor is a session over the same file of many layers whose weights together exceed the L3 cache; only the
library differs. Tuned is what this user's database says (`isofold tune`; --tune runs it first), shipped what is
committed. A library whose values are those of another one is left out, with a note. Bars: no shape slower than with the
defaults by more than 2 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from harness import Results, Worker, interleave, main, parse, per_round, ratios
from linear_models import Kind, write
from linears import SHAPES, W4A8, W8A8, _layers, check
from peers import cache_folder
from subjects import subject_folder

KINDS = [*W4A8, W8A8, Kind("isofold w4a16 g32", "isofold", 4, 32, float_activations=True)]
ROWS = (1, 4, 128)


def libraries(results: Results) -> dict[str, Path]:
    """The op libraries by name; equal ones once."""
    from isofold.runtimes.onnx.oplib.build import build
    from isofold.runtimes.tuning.selection import settings_for_build

    wanted = {
        "defaults": {},
        "shipped": settings_for_build(own=False),
        "tuned": settings_for_build(),
    }
    found: dict[str, Path] = {}
    texts: dict[str, str] = {}
    for name, settings in wanted.items():
        text = str({isa: chosen.to_json() for isa, chosen in sorted(settings.items()) if chosen})
        same = next((other for other, seen in texts.items() if seen == text), None)
        if same is not None:
            results.note(f"{name} is {same}: no other values were found better")
            continue
        texts[name] = text
        found[name] = build(cache_folder() / "benchmarks" / f"ops-{name}.so", force=True, settings=settings)
        results.note(f"{name}: {text}")
    return found


def measure(
    results: Results, found: dict[str, Path], kind: Kind, shape: str, m: int, threads: int, quick: bool
) -> None:
    """One interleaved run of one linear with all libraries."""
    n, k = SHAPES[shape]
    folder = subject_folder("tuning", shape, Path(__file__).with_name("linear_models.py").read_text())
    inputs = folder / f"x-m{m}.npz"
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    np.savez(inputs, x=x)
    layers = _layers(kind, m, n, k, quick)
    path, _ = write(kind, m, n, k, layers, folder)
    workers: list[Worker] = []
    try:
        for name, library in found.items():
            spec = {
                "engine": "onnxruntime",
                "model": str(path),
                "inputs": str(inputs),
                "threads": threads,
                "optimize": "ORT_DISABLE_ALL",
                "library": str(library),
            }
            workers.append(Worker(name, spec))
            check(workers[-1], kind, x, n, k, folder)
        rounds = (5 if quick else 30) if m < 128 else (3 if quick else 10)
        seconds = interleave(workers, rounds, 4 if m < 128 else 1)
    finally:
        for worker in workers:
            worker.close()
    where = f"{kind.name}, {shape} M={m}, {threads} thread{'s' if threads > 1 else ''}"
    for name in found:
        results.sampled(f"{name}: {where}", [1e6 * t / layers for t in per_round(seconds[name])], "us")
    for name in found:
        if name != "defaults":
            speedup = ratios(seconds["defaults"], seconds[name])
            results.sampled(f"{name} against defaults: {where}", speedup, "x", ">= 0.98")


def body() -> int:
    """Tune where asked to, build, run, print."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tune", metavar="TIME", help="run `isofold tune` for so long first")
        parser.add_argument(
            "--shape", choices=sorted(SHAPES), action="append", help="only this shape (repeatable)"
        )
        parser.add_argument(
            "--threads", type=int, choices=(1, 2), action="append", help="only this many threads"
        )

    arguments = parse(__doc__, extra)
    results = Results("tuning")
    if arguments.tune:
        import isofold

        for threads in arguments.threads or (1, 2):
            isofold.tune(time=arguments.tune, threads=threads, progress=print)
    found = libraries(results)
    shapes = arguments.shape or (["4096x4096"] if arguments.quick else list(SHAPES))
    for threads in (1,) if arguments.cpu_time else arguments.threads or (1, 2):
        for shape in shapes if len(found) > 1 else ():
            for m in (1, 128) if arguments.quick else ROWS:
                for kind in KINDS:
                    measure(results, found, kind, shape, m, threads, arguments.quick)
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
