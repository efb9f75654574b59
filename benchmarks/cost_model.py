"""The cost model against the clock: predicted and measured time of every linear in whole models.

    python benchmarks/cost_model.py [--json FILE] [--quick] [--threads N] [--recipe TEXT]

The machine is measured first (`isofold.machine`, from the cache with --quick). Two subjects: linears of a decoder
with 1 row and weights far beyond the L3 (a decode step), and with 128 rows. Rows of the table: the ratio of predicted
to measured time, a layer at a time, with quartiles, and the factor by which its median is off, whichever way. Bar:
a third, as docs/cost-model.md says of itself.
"""

from __future__ import annotations

import argparse
import os
import statistics

import torch
from torch import nn

import isofold
from harness import BenchmarkError, Results, main, parse
from isofold.compiler.machine import linear_formats
from isofold.compiler.report_files import add_profile


class _Layers(nn.Module):
    """Linears of a decoder with a stream of 1024, one after another."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        shapes = [(1024, 3072), (3072, 1024), (1024, 4096), (4096, 1024)] * layers
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False) for k, n in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = torch.tanh(linear(x))
        return x


def body() -> int:
    """Measure the machine, compile, profile, compare."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        parser.add_argument(
            "--recipe", metavar="TEXT", action="append", help="only formats whose recipes' names hold this"
        )

    arguments = parse(__doc__, extra)
    chosen = [
        recipe
        for recipe in linear_formats().values()
        if recipe.weights is not None and any(text in recipe.name for text in arguments.recipe or [""])
    ]
    if not chosen:
        names = ", ".join(recipe.name for recipe in linear_formats().values())
        raise BenchmarkError(f"no recipe has this in its name: {names}")
    isofold.machine(arguments.threads, refresh=not arguments.quick)
    results = Results("cost_model")
    torch.manual_seed(0)
    for recipe in chosen:
        assert recipe.weights is not None
        small = recipe.weights.bits < 8
        # 28 MiB of weights a layer in float32: 160 MB of packed ones for a decode step.
        for rows, layers in ((1, 4 if arguments.quick else (24 if small else 12)), (128, 1)):
            compiled = isofold.compile(
                _Layers(layers).eval(), (torch.randn(rows, 1024),), recipe=recipe, verify=False, measure=False
            )
            report = dict(compiled.report)
            add_profile(report, compiled.profile(runs=20))
            ratios = [
                row["predicted_microseconds"] / row["microseconds"]
                for row in report["layers"]
                if row["predicted_microseconds"] and row["microseconds"]
            ]
            name = f"{recipe.name}, {rows} row{'s' if rows > 1 else ''}, {arguments.threads} threads"
            results.sampled(f"{name}: predicted over measured", ratios, "x")
            middle = statistics.median(ratios)
            results.add(f"{name}: off by", max(middle, 1 / middle), "x", "<= 1.333")
    return results.finish(arguments)


if __name__ == "__main__":
    main(body)
