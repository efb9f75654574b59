"""Histograms of the weights that quantization changed most: as captured, and decoded from the packed bytes.

The decoder is `dialect.packing`'s, so the picture shows what the artefact holds, not what a quantizer meant to write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .dialect.dense_packing import unpack_dense
from .dialect.linear_packed import packed_rows
from .dialect.operator import operator_of
from .dialect.outlier_packing import unpack_outliers
from .dialect.packing import (
    dequantize,
    split_gated,
    unpack_embedding_codes,
    unpack_groups,
    unpack_weight,
)
from .dialect.packing_codebook import unpack_codebook
from .dialect.packing_coded import unpack_coded
from .dialect.sparse_packing import unpack_sparse
from .graph import argument
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


def decoded(program: Program, node: fx.Node) -> Tensor:
    """The float32 matrix `[rows, K]` that a packed operator multiplies by or looks up; gated pairs gate first, matrices
    of several experts one above the other."""

    def constant(name: str) -> Any:
        read = argument(node, name)
        return (
            program.tensors[str(read.target)] if isinstance(read, fx.Node) and read.op == "get_attr" else read
        )

    declared = operator_of(node.target)
    assert declared is not None, f"{node} is no packed operator"
    if declared.name in ("linear_sparse", "linear_sparse_float"):
        n, gated = argument(node, "n"), argument(node, "gated")
        rows = packed_rows(n, gated)
        k, quantized = argument(node, "k"), declared.name == "linear_sparse"
        places, values, offsets = (constant(name) for name in ("places", "values", "offsets"))
        bits = argument(node, "bits") if quantized else 8
        layout = argument(node, "layout")
        matrix = unpack_sparse(layout, places, values, offsets, rows, k, bits).float()
        if quantized:
            scale = unpack_groups(constant("scale"), rows, k, argument(node, "group_size"))
            factors = scale.float() * argument(node, "scale_multiplier")
            matrix = dequantize(matrix, factors, None, argument(node, "group_size"))
        return torch.cat(split_gated(matrix, n)) if gated else matrix
    if declared.name == "linear_dense":
        n, gated = argument(node, "n"), argument(node, "gated")
        matrix = unpack_dense(constant("weight"), packed_rows(n, gated))
        return torch.cat(split_gated(matrix, n)) if gated else matrix
    if declared.name == "linear_grouped_dense":
        return torch.cat([unpack_dense(panels, argument(node, "n")) for panels in constant("weight")])
    weight, scale = constant("weight"), constant("scale")
    if declared.name in ("linear_grouped_packed", "linear_grouped_packed_float"):
        form = (argument(node, name) for name in ("n", "k", "bits", "group_size", "scale_multiplier"))
        n, k, bits, group_size, multiplier = form
        zeros = constant("zero")
        zeros = [None] * len(weight) if zeros is None else zeros
        each = zip(weight, scale, zeros, strict=True)
        return torch.cat(
            [unpack_weight(w, s, z, n, k, bits, group_size, multiplier, torch.float32) for w, s, z in each]
        )
    if declared.name == "embedding_packed":
        codes = unpack_embedding_codes(weight, argument(node, "dim"), argument(node, "bits"))
        return dequantize(codes, scale.float(), constant("zero"), argument(node, "group_size"))
    n = argument(node, "n")
    if declared.name == "conv_packed":
        k = weight.shape[1] * 4
        return unpack_weight(weight, scale, None, n, k, 8, 0, 1.0, torch.float32)
    gated = argument(node, "gated")
    rows = weight.shape[0] * 16 if gated else n
    if declared.name == "linear_codebook":
        matrix = unpack_codebook(
            weight, constant("codebooks"), scale, rows, argument(node, "k"), torch.float32
        )
        return torch.cat(split_gated(matrix, n)) if gated else matrix
    k, group_size, multiplier = (argument(node, name) for name in ("k", "group_size", "scale_multiplier"))
    if declared.name in ("linear_coded", "linear_fp8"):
        form, table = argument(node, "format"), constant("table") if declared.name == "linear_coded" else None
        matrix = unpack_coded(weight, scale, table, rows, k, form, group_size, multiplier, torch.float32)
        return torch.cat(split_gated(matrix, n)) if gated else matrix
    bits = argument(node, "bits")
    matrix = unpack_weight(
        weight, scale, constant("zero"), rows, k, bits, group_size, multiplier, torch.float32
    )
    if declared.name in ("linear_outliers", "linear_outliers_float"):
        places, values, offsets = (constant(name) for name in ("places", "values", "offsets"))
        matrix = matrix + unpack_outliers(
            places, values, offsets, rows, k, argument(node, "outlier_multiplier"), torch.float32
        )
    return torch.cat(split_gated(matrix, n)) if gated else matrix


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
