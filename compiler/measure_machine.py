"""Measuring a machine for the cost model.

Bandwidth is that of a plain sum over float32, at working sets from the second-level cache to far beyond the last.
The paces are those of the very kernels that will run: one linear of 1024 x 1024 is compiled with each format, stays in
the cache, and is profiled at several numbers of rows. The overhead is the time of the same at 64 x 64.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .cost_model import FLOAT_LINEAR, Machine, kind_of
from .frontend import prepare, report_of
from .machine import linear_formats
from .measure_sparse import measured_sparse
from .recipe import Recipe
from .registry import backend_for

Say = Callable[[str], None]

SIZE, SMALL = 1024, 64
ROWS = (1, 8, 32, 128, 512)
SETS = (1 << 19, 1 << 21, 1 << 23, 1 << 25, 1 << 27)
"""Working sets whose bandwidth is measured, in bytes."""


def measured(name: str, threads: int, say: Say) -> Machine:
    """Measure bandwidth and the rates of all formats now; takes about three seconds for each format."""
    recipes = list(linear_formats().values())
    paces: dict[str, list[tuple[float, float]]] = {}
    overhead = 0.0
    with tempfile.TemporaryDirectory(prefix="isofold-machine-") as folder:
        for index, recipe in enumerate(recipes):
            say(f"measure {recipe.name} {index + 1}/{len(recipes)}")
            if not index:
                overhead = _profile(recipe, SMALL, (1,), threads, Path(folder) / "small")[1][0]
            kind, seconds = _profile(recipe, SIZE, ROWS, threads, Path(folder) / str(index))
            # Clocks of microseconds may leave nothing beside the overhead.
            alone = [max(spent - overhead, overhead / 10) for spent in seconds]
            paces.setdefault(kind, [(float(r), s / SIZE**2) for r, s in zip(ROWS, alone, strict=True)])
        say("measure sparse linears")
        sparse = measured_sparse(threads, Path(folder) / "sparse")
    say("measure the read bandwidth")
    bandwidth = [(float(s), _bandwidth(s, threads)) for s in SETS]
    return Machine(name, threads, overhead, bandwidth, paces, sparse)


def _profile(
    recipe: Recipe, size: int, rows: Sequence[int], threads: int, folder: Path
) -> tuple[str, list[float]]:
    """Compile one linear with a recipe and profile it: its kind, and its seconds for each number of rows."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(size, size, generator=generator) / size**0.5)
    example = torch.randn(2, size, generator=generator)
    batch = torch.export.Dim("rows", min=1, max=max(*rows, 2))
    lowerable = prepare(model, (example,), recipe=recipe, dynamic_shapes={"input": {0: batch}}, verify=False)
    folder.mkdir()
    backend = backend_for("cpu")
    backend.write(lowerable.program, folder, report=report_of(lowerable, "cpu", predict=False))
    kinds = {node.name: kind for node in lowerable.program.graph.nodes if (kind := kind_of(node)) is not None}
    opened = backend.open(folder, threads=threads)
    found = []
    for count in rows:
        x = torch.randn(count, size, generator=generator)
        nodes = opened.profile(x, runs=max(10, min(200, 20000 // (count * size // 64))))
        spent = [n["microseconds"] for n in nodes if n["name"] in kinds]
        # A float linear is the runtime's own operator under its own name.
        found.append(1e-6 * (sum(spent) if spent else max(n["microseconds"] for n in nodes)))
    return next(iter(kinds.values()), FLOAT_LINEAR), found


def _bandwidth(size: int, threads: int) -> float:
    """Bytes a second at which a sum goes through `size` bytes again and again, the best of several."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(size // 4)
        times = []
        repeats = max(1, (1 << 25) // size)
        for _ in range(7):
            started = time.perf_counter()
            for _ in range(repeats):
                data.sum()
            times.append((time.perf_counter() - started) / repeats)
        return size / min(times)
    finally:
        torch.set_num_threads(before)
