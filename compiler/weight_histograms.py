"""Histograms of the weights that quantization changed most: as captured, and decoded from the packed bytes.

The picture shows what the artefact holds (`decoded_weights`), not what a quantizer meant to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .decoded_weights import decoded
from .dialect.operator import operator_of
from .program import Program

BINS = 96


def worst_histograms(
    captured: Program, program: Program, rows: Sequence[Mapping[str, Any]], most: int
) -> list[dict[str, Any]]:
    """Histograms of the `most` rows of largest error.

    Each is `{module, bits, error, low, high, before, after}` with counts in BINS equal bins of `[low, high]`.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: -(r["error"] or 0.0)):
        before = captured.tensors.get(str(row["weight"]))
        node = nodes.get(str(row["packed"]))
        if len(found) == most or not isinstance(before, Tensor) or node is None:
            continue
        matrix = before.detach().float()
        matrix = matrix.flatten(0, 1) if is_grouped(node) else matrix.flatten(1)
        after = weight_inside(decoded(program, node), matrix)
        if after is not None:
            facts = {key: row[key] for key in ("module", "bits", "error")}
            found.append({**facts, **_counts(before.detach().float(), after)})
    return found


def is_grouped(node: fx.Node) -> bool:
    """Whether a packed operator has a matrix for each expert."""
    declared = operator_of(node.target)
    return declared is not None and declared.name.startswith("linear_grouped")


def weight_inside(matrix: Tensor, weight: Tensor) -> Tensor | None:
    """The rows of `matrix` that hold `weight` `[N, K]` after quantization, or None where nothing is near.

    Several layers may have become one matrix, so the place is the run of N rows whose first and last row are nearest.
    """
    n, k = weight.shape
    if matrix.shape[0] < n or matrix.shape[1] < k:
        return None
    matrix = matrix[:, :k]
    starts = matrix.shape[0] - n + 1
    distance = (matrix[:starts] - weight[0]).square().sum(1) + (matrix[n - 1 :] - weight[-1]).square().sum(1)
    start = int(distance.argmin())
    found = matrix[start : start + n]
    near = (found - weight).square().sum() < 0.5 * weight.square().sum()
    return found if bool(near) else None


def _counts(before: Tensor, after: Tensor) -> dict[str, Any]:
    low = float(min(before.min(), after.min()))
    high = float(max(before.max(), after.max()))
    counts = [torch.histc(t, BINS, low, high).long().tolist() for t in (before, after)]
    return {"low": low, "high": high, "before": counts[0], "after": counts[1]}
