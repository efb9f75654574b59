"""`weights: {format: auto}`: for each linear the format that is predicted to be the fastest here and loses little.

    format(layer) = argmin over formats with |W - Q(W)| <= max_error |W| of the predicted time on the example inputs

The prediction is the cost model's (`compiler/cost_model.py`, with the rates of `isofold machine`); Q is the rounding
that the format's own pass will do. Linears of one module path get one format. Where no format keeps the error, the one
with the least error is taken, and the record says so. Candidates: integers of 8 bits a row, of 4, 3 and 2 bits in
groups of 32, and of 4 bits in groups of 128 with 1 % of outliers; with float activations also FP8, MXFP4 and NF4.
Experts have integers only; their time is that of the experts that the example's rows choose at most, with as many rows
each. Times within a tenth of each other count as equal: then fewer bytes win. Where the recipe skips zeros
(`sparsity`), integers that have sparse kernels take the time that `sparse_speed` predicts for the weight's zeros, where
that is less.

The choice is made on the canonical program, before transforms are folded in, which change errors a little and times not
at all. The result is a recipe with one rule for each module path; later passes never see `auto`.

BITWISE: `choose_formats` itself only records.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import optimization_hint

from ..compiler.cost_model import MARGIN, Machine, Work
from ..compiler.dialect import linear_grouped
from ..compiler.editor import Editor
from ..compiler.graph import module_path, value
from ..compiler.passes import Guarantee, define_pass
from ..compiler.program import Program
from ..compiler.recipe import LayerRule, Recipe, Sparsity, WeightFormat
from .extract_sparsity import FEWEST_ZEROS
from .layers import Layer, check_finite, packed_bytes, selected
from .rounded_weight import rounded_weight
from .sparse_mixtures import ways_to_store
from .sparse_speed import dense_time

INTEGERS = (
    WeightFormat(bits=8),
    WeightFormat(bits=4, group_size=32),
    WeightFormat(bits=3, group_size=32, symmetric=False),
    WeightFormat(bits=2, group_size=32, symmetric=False),
)
OUTLIERS = WeightFormat(bits=4, group_size=128, outliers=0.01)
OUTLIER_TIME = 1.1
"""Time of a linear with `OUTLIERS`, to that without them (measured: 1.02 to 1.14, `benchmarks/formats.py`)."""
CODES = (WeightFormat(format="e4m3"), WeightFormat(format="mxfp4"), WeightFormat(format="nf4", group_size=64))


@dataclass(frozen=True)
class Candidate:
    """A format on the linears of one path: its worst relative error, bytes, and seconds predicted for all of them."""

    form: WeightFormat
    error: float
    size: int
    seconds: float

    @property
    def name(self) -> str:
        """In words."""
        per = f"groups of {self.form.group_size}" if self.form.group_size else "one scale a row"
        beside = f", {self.form.outliers:.0%} outliers" if self.form.outliers else ""
        return (
            f"{'int' + str(self.form.bits) if self.form.format == 'int' else self.form.format}, {per}{beside}"
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen for a path, from all candidates in the order of their times."""

    path: str
    chosen: Candidate
    candidates: Sequence[Candidate]
    max_error: float


def resolve_formats(program: Program, recipe: Recipe, machine: Machine) -> tuple[Recipe, list[Choice]]:
    """`recipe` without `auto` for the canonical `program`, and the choices. Raises InputError for NaN in weights."""
    editor, plain = Editor(program), _without_auto(recipe)
    groups: dict[str, list[Layer]] = {}
    for layer, _, reason in selected(editor, plain, "weights"):
        if reason is None and _is_auto(recipe.format_for(layer.path, "weights")):
            groups.setdefault(layer.path, []).append(layer)
    everything = [layer for group in groups.values() for layer in group]
    check_finite(editor, everything)
    working_sets = {
        form: sum(_bytes_read(layer, form) for layer in everything) for form in (*INTEGERS, OUTLIERS, *CODES)
    }
    choices = []
    for path, group in groups.items():
        integer = recipe.format_for(path, "activations").mode != "float"
        forms: tuple[WeightFormat, ...] = (*INTEGERS, OUTLIERS) if integer else (*INTEGERS, OUTLIERS, *CODES)
        forms = INTEGERS if any(layer.is_grouped for layer in group) else forms
        zeros = recipe.format_for(path, "sparsity") if integer else None
        candidates = [
            _candidate(editor, group, form, integer, machine, working_sets[form], zeros) for form in forms
        ]
        choices.append(_choose(path, candidates, recipe.format_for(path, "weights").max_error))
    # A path is a glob here: what it has of a glob's characters is meant literally.
    rules = [LayerRule(match=glob.escape(c.path), weights=c.chosen.form) for c in choices]
    return plain.model_copy(update={"layers": [*plain.layers, *rules]}), choices


def _without_auto(recipe: Recipe) -> Recipe:
    """The recipe with int8 where it says auto: what is left of it decides nothing."""
    int8 = WeightFormat()
    layers = [
        rule.model_copy(update={"weights": int8}) if _is_auto(rule.weights) else rule
        for rule in recipe.layers
    ]
    return recipe.model_copy(
        update={"weights": int8 if _is_auto(recipe.weights) else recipe.weights, "layers": layers}
    )


def _is_auto(form: WeightFormat | None) -> bool:
    return form is not None and form.format == "auto"


def _choose(path: str, candidates: Sequence[Candidate], max_error: float) -> Choice:
    ordered = sorted(candidates, key=lambda c: c.seconds)
    good = [c for c in ordered if c.error <= max_error]
    if not good:
        return Choice(path, min(ordered, key=lambda c: c.error), ordered, max_error)
    near = [c for c in good if c.seconds <= MARGIN * good[0].seconds]
    return Choice(path, min(near, key=lambda c: c.size), ordered, max_error)


def _candidate(
    editor: Editor, group: Sequence[Layer], form: WeightFormat, integer: bool, machine: Machine, working_set: int,
    zeros: Sparsity | None,
) -> Candidate:  # fmt: skip
    errors, size, seconds = [0.0], 0, 0.0
    for layer in group:
        weight = editor.tensor(layer.weight)
        assert weight is not None
        weight = weight.detach()
        rows, chosen, every = _experts_read(layer)
        work = Work(
            _kind(form, integer),
            -(-rows // chosen),
            weight.numel() * chosen // every,
            _bytes_read(layer, form),
        )
        prediction = machine.predict(work, working_set)
        size += packed_bytes("weights", tuple(weight.shape), form)
        skipped = None if layer.is_grouped else zeros
        share = OUTLIER_TIME if form.outliers else _share_with_zeros(weight, form, work, skipped)
        seconds += float("inf") if prediction is None else share * prediction.seconds
        norm = float(weight.norm())
        matrix = weight.flatten(0, 1) if layer.is_grouped else weight
        errors.append(float((matrix - rounded_weight(matrix, form)).norm()) / norm if norm else 0.0)
    return Candidate(form, max(errors), size, seconds)


def _experts_read(layer: Layer) -> tuple[int, int, int]:
    """Rows of the layer on the example inputs, how many matrices they choose at most, and of how many."""
    y = value(layer.node)
    features = int(y.shape[-1])
    rows = max(1, math.prod(optimization_hint(size, 1) for size in y.shape) // features)
    every = int(value(layer.weight).shape[0]) if layer.is_grouped else 1
    return rows, min(rows, every), every


def _bytes_read(layer: Layer, form: WeightFormat) -> int:
    _, chosen, every = _experts_read(layer)
    shape = tuple(int(size) for size in value(layer.weight).shape)
    return packed_bytes("weights", shape, form) * chosen // every


def _share_with_zeros(weight: Tensor, form: WeightFormat, work: Work, zeros: Sparsity | None) -> float:
    """Time of a linear that skips its weight's zeros, to that of the dense one; 1 where it would stay dense."""
    sparse = (
        form.format == "int"
        and form.symmetric
        and (form.bits == 4 or (form.bits == 8 and not form.group_size))
    )
    if zeros is None or zeros.mode == "off" or not sparse:
        return 1.0
    there = weight != 0
    if float(there.float().mean()) > 1 - FEWEST_ZEROS:
        return 1.0
    found = ways_to_store(there.to(torch.int8), f"int{form.bits}", work.rows, zeros.layout)
    dense = dense_time(f"int{form.bits}", work.rows, weight.numel(), work.weight_bytes)
    return found[0].nanoseconds / dense if found and found[0].nanoseconds * zeros.gain <= dense else 1.0


def _kind(form: WeightFormat, integer: bool) -> str:
    """The cost model's kind of a linear in this format."""
    grouped = " in groups" if form.group_size else ""
    if form.format != "int":
        return f"linear_coded {form.format}{grouped}"
    return f"linear_packed{'' if integer else '_float'} {form.bits} bits{grouped}"


@define_pass(Guarantee.BITWISE)
def choose_formats(editor: Editor, *, choices: Sequence[Choice]) -> None:
    """Record what `resolve_formats` chose. Changes nothing."""
    by_path = {choice.path: choice for choice in choices}
    for node in editor.calls(torch.ops.aten.linear.default, linear_grouped.overload):
        choice = by_path.pop(module_path(node), None)
        if choice is None:
            continue
        chosen, others = choice.chosen, [c for c in choice.candidates if c is not choice.chosen]
        over = f", over the {choice.max_error:.2g} allowed" if chosen.error > choice.max_error else ""
        editor.applied(
            node,
            f"{chosen.name}: predicted {1e6 * chosen.seconds:.0f} µs, relative error {chosen.error:.2e}{over}; not "
            + ", ".join(f"{c.name} ({1e6 * c.seconds:.0f} µs, {c.error:.2e})" for c in others),
            chosen=chosen.name,
            predicted_microseconds=1e6 * chosen.seconds,
            candidates=[_facts(c) for c in choice.candidates],
        )


def _facts(candidate: Candidate) -> dict[str, Any]:
    return {
        "format": candidate.name,
        "error": candidate.error,
        "bytes": candidate.size,
        "predicted_microseconds": 1e6 * candidate.seconds,
    }
