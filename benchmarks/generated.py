"""Kernels that TVM generates for the CPU: their default schedules, our own parameters, and MetaSchedule's schedules.

    python benchmarks/generated.py [--json FILE] [--quick] [--time 60s] [--traces 48] [--only NAME]

Every nest is tuned on its own into a database that lasts as long as the run. Printed are the default's time, the best
of each source in its first measurement, and what was confirmed, which is what compiling takes. Bar: no confirmed
schedule is slower than the default by more than 2 %.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from harness import Results, main, parse


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call it."""
        return self.function(x)


@dataclass(frozen=True)
class Nest:
    """A module, the shape of its input, and which of its sizes a call alone knows."""

    module: nn.Module
    shape: tuple[int, ...]
    unknown: Any = None


def nests() -> dict[str, Nest]:
    """What is measured."""
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=4, max=65536)
    picture = ({0: batch, 2: 2 * Dim("rows", min=2, max=64), 3: 2 * Dim("columns", min=2, max=64)},)
    return {
        "average pooling 2x2, 512 x 28 x 28": Nest(nn.AvgPool2d(2), (1, 512, 28, 28)),
        "max pooling 3x3/2, 64 x 112 x 112": Nest(nn.MaxPool2d(3, 2, 1), (1, 64, 112, 112)),
        "conv 3x3, 64 to 64, 56 x 56": Nest(nn.Conv2d(64, 64, 3, padding=1), (1, 64, 56, 56)),
        "conv 1x1, 256 to 64, 56 x 56": Nest(nn.Conv2d(256, 64, 1), (1, 256, 56, 56)),
        "depthwise 7x7, 96, 56 x 56": Nest(nn.Conv2d(96, 96, 7, padding=3, groups=96), (1, 96, 56, 56)),
        "depthwise 7x7, 384, unknown sizes": Nest(
            nn.Conv2d(384, 384, 7, padding=3, groups=384), (2, 384, 14, 14), picture
        ),
        "log softmax, 128 x 3000": Nest(Function(lambda x: torch.log_softmax(x, -1)), (128, 3000)),
        "group norm, 512 x 3199, unknown sizes": Nest(
            nn.GroupNorm(512, 512), (2, 512, 3199), ({0: batch, 2: length},)
        ),
        "transpose, 384 x 14 x 14, unknown sizes": Nest(
            Function(lambda x: x.permute(0, 2, 3, 1).contiguous() + 1), (2, 384, 14, 14), picture
        ),
        "arg max, 128 x 3000": Nest(Function(lambda x: x.argmax(-1)), (128, 3000)),
    }


def measure(results: Results, name: str, nest: Nest, seconds: float, traces: int, database: Path) -> None:
    """Tune the kernels of one nest and print what each source gave."""
    from isofold.compiler.frontend import prepare
    from isofold.runtimes.tuning.database import read_records
    from isofold.runtimes.tuning.search import TRACE
    from isofold.runtimes.tvm.tune_cpu import tune_program

    x = torch.randn(*nest.shape)
    options: dict[str, Any] = {"dynamic_shapes": nest.unknown, "verify": False, "dense": True}
    program = prepare(nest.module.eval(), (x,), recipe="float32", **options).program
    found = tune_program(program, seconds, database, traces=traces)
    for note in found["notes"]:
        results.note(f"{name}: {note}")
    records = [r for r in read_records(database)[0] if r.status == "ok" and not r.confirmed]
    for row in found["workloads"]:
        mine = [r for r in records if r.group == row["group"]]
        where = name if len(found["workloads"]) == 1 else f"{name}, {row['workload']}"
        if row["before"] is None:
            results.note(f"{where}: nothing was measured in {seconds:.0f} s")
            continue
        results.add(f"default: {where}", 1e6 * row["before"], "us")
        for source, of_traces in (("own parameters", False), ("MetaSchedule", True)):
            ratios = [r.ratio for r in mine if (TRACE in r.knobs) == of_traces and r.ratio is not None]
            if ratios:
                results.add(
                    f"{source}, best of {len(ratios)}: {where}", 1e6 * row["before"] * min(ratios), "us"
                )
        if row["ratio"] is not None:
            source = "MetaSchedule" if row["invented"] else "own parameters"
            results.add(f"chosen ({source}) against the default: {where}", row["ratio"], "x", "<= 1.02")


def body() -> int:
    """Tune every nest, print."""
    from isofold.compiler.tune_job import duration

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--time", default="60s", help="for each nest")
        parser.add_argument("--traces", type=int, default=48, help="of MetaSchedule, for each kernel")
        parser.add_argument("--only", help="nests whose name begins so")

    arguments = parse(__doc__, extra)
    results = Results("generated")
    with tempfile.TemporaryDirectory() as folder:
        for name, nest in nests().items():
            if arguments.only is None or name.startswith(arguments.only):
                seconds = 15.0 if arguments.quick else duration(arguments.time)
                measure(results, name, nest, seconds, arguments.traces, Path(folder, "tuning.jsonl"))
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
