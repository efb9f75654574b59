"""Measuring what linears on sparse weights cost on a machine, for `passes/sparse_rates.py`.

One model is compiled that holds a linear of 2048 x 1024 for every layout, type of values and density, and profiled at
a few numbers of rows: one compilation, some seconds. A smaller one of the first form of each type of weights tells what
a node costs by itself, with the transposition of many rows. `passes/sparse_rates.py` interprets the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .dialect.sparse_layouts import HELD
from .frontend import prepare, report_of
from .recipe import ActivationFormat, LayerRule, Recipe, Sparsity, WeightFormat
from .registry import backend_for

INPUTS, OUTPUTS, PART = 1024, 2048, 8
"""Sizes of the measured linear; the small one has OUTPUTS / PART outputs."""

MANY = 128
ROWS = (1, 2, 4, MANY)
RUNS, REPEATS = (20, 4), 4
"""Runs in one profile with few and with many rows, and the number of profiles."""

DENSITIES = {"windows": (0.1, 0.05)}
"""Densities (shares of non-zero weights) that are measured, by layout; others have 0.5 and 0.2, N:M its own."""

ANY_GAIN = 1e-3
"""`sparsity.gain` so low that the asked-for layout is taken whatever is predicted of it."""

WEIGHTS = {
    "float32": None,
    "int8": WeightFormat(bits=8),
    "int4": WeightFormat(bits=4, group_size=32),
}

WEIGHTS_OF = {"float32": ("float32", "bfloat16"), "int8": ("int8",), "int4": ("int4",)}
"""Types of stored values that a recipe's type of weights can give."""

Points = list[tuple[float, float, float]]
"""(rows, density, seconds for one weight with all rows)."""


@dataclass(frozen=True)
class Form:
    """One measured linear: recipe of its weights, layout, type of stored values, density."""

    weights: str
    layout: str
    value: str
    density: float


def measured_sparse(threads: int, folder: Path) -> dict[str, Points]:
    """Measure every layout and type of values with weights in the cache; points by `"LAYOUT VALUE"`."""
    forms = [
        Form(weights, layout, value, density)
        for weights, values in WEIGHTS_OF.items()
        for layout, held in HELD.items()
        for value in values
        if value in held
        for density in _densities(layout)
    ]
    kinds = list(dict.fromkeys(form.weights for form in forms))
    first = [next(form for form in forms if form.weights == kind) for kind in kinds]
    measured = _profile(first, forms, threads, folder / "model")
    # What is left when the part that grows with the outputs is taken away.
    alone: dict[str, list[float]] = {}
    for form, small in zip(first, measured, strict=False):
        whole = measured[len(first) + forms.index(form)]
        alone[form.weights] = [
            max((PART * s - b) / (PART - 1), 0.0) for s, b in zip(small, whole, strict=True)
        ]
    found: dict[str, Points] = {}
    for form, seconds in zip(forms, measured[len(first) :], strict=True):
        points = found.setdefault(f"{form.layout} {form.value}", [])
        for rows, spent, fixed in zip(ROWS, seconds, alone[form.weights], strict=True):
            points.append((float(rows), form.density, max(spent - fixed, spent / 4) / (INPUTS * OUTPUTS)))
    return found


def _densities(layout: str) -> tuple[float, ...]:
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        return (some / of,)
    return DENSITIES.get(layout, (0.5, 0.2))


class _Beside(nn.Module):
    """A module of linears that read the same input and return one result each."""

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(INPUTS, len(m), bias=False) for m in matrices)
        for layer, matrix in zip(self.layers, matrices, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight = nn.Parameter(matrix)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(input) for layer in self.layers)


def _profile(small: list[Form], whole: list[Form], threads: int, folder: Path) -> list[list[float]]:
    """Seconds by number of rows (`ROWS`): a list for each small linear, then for each whole one."""
    generator = torch.Generator().manual_seed(0)
    chosen = [*small, *whole]
    matrices = [_matrix(form, generator) for form in chosen]
    matrices[: len(small)] = [matrix[: OUTPUTS // PART] for matrix in matrices[: len(small)]]
    rules = [
        LayerRule(
            match=f"layers.{i}",
            weights=WEIGHTS[form.weights],
            activations=ActivationFormat(mode="float" if form.weights == "float32" else "dynamic"),
            sparsity=Sparsity.model_validate({"layout": form.layout, "gain": ANY_GAIN}),
        )
        for i, form in enumerate(chosen)
    ]
    recipe = Recipe(sparsity=Sparsity(), layers=rules)
    example = torch.randn(2, INPUTS, generator=generator)
    batch = torch.export.Dim("rows", min=1, max=max(ROWS))
    model = _Beside(matrices)
    lowerable = prepare(model, (example,), recipe=recipe, dynamic_shapes={"input": {0: batch}}, verify=False)
    folder.mkdir(parents=True)
    backend = backend_for("cpu")
    report = report_of(lowerable, "cpu", predict=False)
    backend.write(lowerable.program, folder, report=report, check=False)  # times are asked for, not results
    names = [n.name for n in lowerable.program.graph.nodes if "linear_sparse" in str(n.target)]
    assert len(names) == len(chosen), f"{len(names)} of {len(chosen)} linears became sparse"
    opened = backend.open(folder, threads=threads)
    return [
        list(times)
        for times in zip(*(_seconds(opened, names, rows, generator) for rows in ROWS), strict=True)
    ]


def _seconds(opened: Any, names: list[str], rows: int, generator: torch.Generator) -> list[float]:
    """Least seconds of each node over several profiles, as others may use the machine."""
    x = torch.randn(rows, INPUTS, generator=generator)
    best = dict.fromkeys(names, float("inf"))
    for _ in range(REPEATS):
        for node in opened.profile(x, runs=RUNS[rows == MANY]):
            if node["name"] in best:
                best[node["name"]] = min(best[node["name"]], 1e-6 * node["microseconds"])
    return [best[name] for name in names]


def _matrix(form: Form, generator: torch.Generator) -> Tensor:
    """Random weights in the pattern of a layout; bfloat16 numbers where these are to be stored."""
    layout, density = form.layout, form.density
    values = torch.randn(OUTPUTS, INPUTS, generator=generator).clamp(-2, 2)
    values = values + values.sign()  # nothing else is rounded to zero
    if form.value == "bfloat16":
        values = values.bfloat16().float()
    if ":" in layout:
        some, of = map(int, layout.split(":"))
        order = torch.rand(OUTPUTS, INPUTS // of, of, generator=generator).argsort(-1)
        return values * (order < some).reshape(OUTPUTS, INPUTS)
    height, width = map(int, layout.split("x")) if "x" in layout else (1, 1)
    there = torch.rand(OUTPUTS // height, INPUTS // width, generator=generator) < density
    return values * there.repeat_interleave(height, 0).repeat_interleave(width, 1)
