"""The cost model in the report: predicted times of layers, and formats that are slower than a dense one would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from .cost_model import (
    MARGIN,
    Machine,
    Prediction,
    Work,
    dense_alternatives,
    kind_of,
    thin_works,
    work_of,
    working_set,
)
from .program import Program


def predict_layers(
    program: Program,
    rows: Sequence[dict[str, Any]],
    machine: Machine,
    *,
    measured_here: bool,
    sparsity: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Put `predicted_microseconds` and `limit` into each row of `report.layer_rows`, None where nothing is known.

    sparsity: rows of `report.sparsity_rows`, whose times depend on their zeros and are those of `extract_sparsity`.
    Returns `{machine, threads, measured_here, working_set, predicted_microseconds, slower, unmeasured}`; slower has
    `{module, format, microseconds, faster, faster_microseconds}` for every layer whose format is predicted to be
    slower than the same matrix as dense int8, or as dense int4 where it needs no more bytes than that (with zeros that
    are skipped: than as dense codes or floats of its own type). A part of low rank beside a weight is counted with it.
    unmeasured: kinds for which the machine has no rates.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    size = working_set(program.graph)
    slower = [_slow_zeros(row) for row in sparsity if row["predicted_speedup"] * MARGIN < 1]
    skipping = {row["node"]: row for row in sparsity}
    unmeasured: set[str] = set()
    total = 0.0
    for row in rows:
        node = nodes.get(row["packed"] or "")
        found = None if node is None else _predicted(machine, node, size)
        row["predicted_microseconds"] = row["limit"] = None
        if node is not None and node.name in skipping:
            row["predicted_microseconds"] = _chosen(skipping[node.name]) * row["share"]
            total += row["predicted_microseconds"]
            continue
        if found is None:
            kind = None if node is None else kind_of(node)
            unmeasured |= set() if kind is None else {kind}
            continue
        work, prediction = found
        row["predicted_microseconds"] = 1e6 * prediction.seconds * row["share"]
        row["limit"] = prediction.limit
        total += row["predicted_microseconds"]
        best = _faster(machine, work, prediction, size)
        if best is not None:
            slower.append(
                {
                    "module": row["module"],
                    "format": work.kind,
                    "microseconds": 1e6 * prediction.seconds,
                    "faster": best[0],
                    "faster_microseconds": 1e6 * best[1].seconds,
                }
            )
    return {
        "machine": machine.name,
        "threads": machine.threads,
        "measured_here": measured_here,
        "working_set": size,
        "predicted_microseconds": total,
        "slower": slower,
        "unmeasured": sorted(unmeasured),
    }


def _chosen(row: Mapping[str, Any]) -> float:
    """Microseconds that `extract_sparsity` predicted for what it stored."""
    return float(row["candidates"][f"{row['layout']} {row['values']}"])


def _slow_zeros(row: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `slower` for zeros that are skipped though dense would be faster (a recipe can ask for that)."""
    time = _chosen(row)
    return {
        "module": row["module"],
        "format": f"zeros skipped, {row['layout']} of {row['values']}",
        "microseconds": time,
        "faster": "dense",
        "faster_microseconds": time * row["predicted_speedup"],
    }


def _predicted(machine: Machine, node: fx.Node, size: int) -> tuple[Work, Prediction] | None:
    work = work_of(node)
    prediction = None if work is None else machine.predict(work, size)
    if work is None or prediction is None:
        return None
    beside = [machine.predict(thin, size) for thin in thin_works(node)]
    seconds = prediction.seconds + sum(thin.seconds for thin in beside if thin is not None)
    return work, replace(prediction, seconds=seconds)


def _faster(machine: Machine, work: Work, prediction: Prediction, size: int) -> tuple[str, Prediction] | None:
    """The dense format that is predicted to be the fastest, where it beats this one."""
    found = [
        (name, other_prediction)
        for name, other in dense_alternatives(work).items()
        # A model all in the other format has another working set.
        if (other_prediction := machine.predict(other, size * other.weight_bytes / max(work.weight_bytes, 1)))
        is not None
    ]
    best = min(found, key=lambda item: item[1].seconds, default=None)
    return best if best is not None and best[1].seconds * MARGIN < prediction.seconds else None
