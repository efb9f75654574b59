"""Measuring what linears on sparse weights cost on a machine, for `passes/sparse_rates.py`.

For each type of values one model is compiled that holds a linear of 2048 x 1024 for every layout and density, and
profiled at a few numbers of rows: three compilations, some seconds. A smaller one of the first form tells what a node
costs by itself, with the transposition of many rows. What the numbers mean is the passes' affair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .dialect.sparse_layouts import HELD
from .frontend import prepare, report_of
from .recipe import ActivationFormat, LayerRule, Recipe, Sparsity, WeightFormat
from .registry import backend_for

INPUTS, OUTPUTS, PART = 1024, 2048, 8
"""Of a linear; the small one has a PART of the outputs."""

MANY = 128
ROWS = (1, 2, 4, MANY)
RUNS, REPEATS = (20, 4), 4
"""Of a profile of few and of many rows, and profiles."""

DENSITIES = {"windows": (0.1, 0.05)}
"""Shares of weights that are not zero, by layout; others: 0.5 and 0.2. N:M has the share of its pattern."""

ANY_GAIN = 1e-3
"""A gain that every layout reaches: the layout that is asked for is taken, whatever is predicted of it."""

WEIGHTS = {
    "float32": None,
    "int8": WeightFormat(bits=8),
    "int4": WeightFormat(bits=4, group_size=32),
}

Points = list[tuple[float, float, float]]
"""(rows, share of weights that are not zero, seconds a weight for all rows)."""


def measured_sparse(threads: int, folder: Path) -> dict[str, Points]:
    """Points of each layout and type of values, by `layout value`, weights in the cache."""
    found: dict[str, Points] = {}
    forms = [(layout, value) for layout, values in HELD.items() for value in values]
    for weights in ("float32", "int8", "int4"):
        kinds = ("float32", "bfloat16") if weights == "float32" else (weights,)
        chosen = [
            (layout, value, density)
            for layout, value in forms
            if value in kinds
            for density in _densities(layout)
        ]
        small, *whole = _profile(weights, chosen, threads, folder / weights)
        # What is left when the part that grows with the outputs is taken away.
        alone = [max((PART * s - b) / (PART - 1), 0.0) for s, b in zip(small, whole[0], strict=True)]
        for (layout, value, density), seconds in zip(chosen, whole, strict=True):
            points = found.setdefault(f"{layout} {value}", [])
            for rows, spent, fixed in zip(ROWS, seconds, alone, strict=True):
                points.append((float(rows), density, max(spent - fixed, spent / 4) / (INPUTS * OUTPUTS)))
    return found


def _densities(layout: str) -> tuple[float, ...]:
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        return (some / of,)
    return DENSITIES.get(layout, (0.5, 0.2))


class _Beside(nn.Module):
    """Linears on one input, one output each."""

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(INPUTS, len(m), bias=False) for m in matrices)
        for layer, matrix in zip(self.layers, matrices, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight = nn.Parameter(matrix)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(input) for layer in self.layers)


def _profile(
    weights: str, chosen: list[tuple[str, str, float]], threads: int, folder: Path
) -> list[list[float]]:
    """Seconds by number of rows of the small linear of the first form, and of each form: layout, type of values,
    density."""
    generator = torch.Generator().manual_seed(0)
    matrices = [_matrix(*form, generator) for form in chosen]
    matrices.insert(0, matrices[0][: OUTPUTS // PART])
    chosen = [chosen[0], *chosen]
    model = _Beside(matrices)
    rules = [
        LayerRule(match=f"layers.{i}", sparsity=Sparsity.model_validate({"layout": layout, "gain": ANY_GAIN}))
        for i, (layout, _, _) in enumerate(chosen)
    ]
    recipe = Recipe(
        weights=WEIGHTS[weights],
        activations=ActivationFormat(mode="float" if weights == "float32" else "dynamic"),
        sparsity=Sparsity(),
        layers=rules,
    )
    example = torch.randn(2, INPUTS, generator=generator)
    batch = torch.export.Dim("rows", min=1, max=max(ROWS))
    lowerable = prepare(model, (example,), recipe=recipe, dynamic_shapes={"input": {0: batch}}, verify=False)
    folder.mkdir(parents=True)
    backend = backend_for("cpu")
    backend.write(lowerable.program, folder, report=report_of(lowerable, "cpu", predict=False))
    names = [n.name for n in lowerable.program.graph.nodes if "linear_sparse" in str(n.target)]
    assert len(names) == len(chosen), f"{len(names)} of {len(chosen)} linears became sparse"
    opened = backend.open(folder, threads=threads)
    return [
        list(times)
        for times in zip(*(_seconds(opened, names, rows, generator) for rows in ROWS), strict=True)
    ]


def _seconds(opened: Any, names: list[str], rows: int, generator: torch.Generator) -> list[float]:
    """Of each node, the best of several profiles: others may use the machine."""
    x = torch.randn(rows, INPUTS, generator=generator)
    best = dict.fromkeys(names, float("inf"))
    for _ in range(REPEATS):
        for node in opened.profile(x, runs=RUNS[rows == MANY]):
            if node["name"] in best:
                best[node["name"]] = min(best[node["name"]], 1e-6 * node["microseconds"])
    return [best[name] for name in names]


def _matrix(layout: str, value: str, density: float, generator: torch.Generator) -> Tensor:
    """Random weights in the pattern of a layout; bfloat16 numbers where these are to be stored."""
    values = torch.randn(OUTPUTS, INPUTS, generator=generator).clamp(-2, 2)
    values = values + values.sign()  # nothing else is rounded to zero
    if value == "bfloat16":
        values = values.bfloat16().float()
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        order = torch.rand(OUTPUTS, INPUTS // of, of, generator=generator).argsort(-1)
        return values * (order < some).reshape(OUTPUTS, INPUTS)
    height, width = map(int, layout.split("x")) if "x" in layout else (1, 1)
    there = torch.rand(OUTPUTS // height, INPUTS // width, generator=generator) < density
    return values * there.repeat_interleave(height, 0).repeat_interleave(width, 1)
