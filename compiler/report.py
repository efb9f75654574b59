"""The report of a compilation: a JSON-like dictionary that says what was done to which layer, and what was not.

    model          class and inputs that were captured
    recipe, target, environment, seconds
    totals         bytes, operators and parameters, before and after
    passes         every `PassReport.to_json()`, in order
    layers         one row for each quantized weight (see `layer_rows`)
    refused        places left alone, grouped by pass and reason
    blocks         the model as a graph of blocks, and one repeated block operator by operator (`block_graph`)
    histograms     weights of the worst layers before and after
    spaces         channel spaces of the canonical program (`spaces.describe`), None for recipes that fold nothing
    folds          what each pass that folds transforms did, its error, and its refusals (see `fold_rows`)
    sparsity       linears that skip the zeros of their weights (see `sparsity_rows`)
    hadamards      transforms that are computed at run time (see `online_hadamards`)
    caches         keys and values that go in and out as codes (`interface.cache_facts`)
    cost_model     what a machine's rates predict (`predicted_times.predict_layers`), None without a machine

`add_profile` puts in what ONNX Runtime measured; `html_report.render_html` draws the page. Bytes are counted and times
measured; only what is called predicted is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .block_graph import block_graph
from .cost_model import Machine
from .decoded_weights import decoded
from .dialect.operator import operator_of
from .graph import argument, module_path, place_of, value
from .interface import cache_facts
from .passes import PassReport
from .predicted_times import predict_layers
from .program import Program
from .weight_histograms import weight_inside, worst_histograms

WORST = 6
"""Layers whose weights are drawn."""
FOLDS = (
    *("untie_embeddings", "fold_norm_affine", "center_norms", "balance_scales", "fold_rotation"),
    *("fold_edges", "transform_edges", "absorb_into_norms", "place_hadamards"),
)
"""Passes of `recipe.fold`, in the order in which they run."""


def build_report(
    *,
    captured: Program,
    program: Program,
    passes: Sequence[PassReport],
    recipe: Mapping[str, Any],
    target: str,
    environment: Mapping[str, Any],
    seconds: Mapping[str, float],
    spaces: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    measured_here: bool = True,
) -> dict[str, Any]:
    """The report of `program`, compiled from `captured`. `seconds` is kept by reference, so later entries show.

    machine: rates for predicted times; measured_here: whether they are those of this machine.
    """
    records = [report.to_json() for report in passes]
    layers = layer_rows(captured, program, records)
    sparsity = sparsity_rows(records)
    predicted = (
        None
        if machine is None
        else predict_layers(program, layers, machine, measured_here=measured_here, sparsity=sparsity)
    )
    return {
        "isofold": environment.get("isofold"),
        "model": _model(captured),
        "recipe": dict(recipe),
        "target": target,
        "environment": dict(environment),
        "seconds": seconds,
        "totals": _totals(captured, program, layers),
        "passes": records,
        "layers": layers,
        "refused": refused_groups(records),
        "blocks": block_graph(captured, program),
        "histograms": worst_histograms(captured, program, layers, WORST),
        "spaces": None if spaces is None else dict(spaces),
        "folds": fold_rows(records),
        "sparsity": sparsity,
        "hadamards": online_hadamards(program),
        "caches": cache_facts(program),
        "cost_model": predicted,
    }


def layer_rows(
    captured: Program, program: Program, records: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each weight that a `quantize_*` pass changed, in the order of the passes.

    module, node, source, kind, weight (name of the captured tensor), shape, bits, format, group_size, symmetric, error
    (relative root mean square of the change), bytes_before, bytes_after, packed (node of the final program that
    computes it), operator, share (of that node's rows), microseconds (None until `add_profile`), and
    predicted_microseconds and limit (None until `predict_layers`).
    """
    rows = [_layer_row(captured, entry) for entry in _quantized_entries(records)]
    _attach_packed(captured, program, rows)
    return rows


def refused_groups(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Refusals grouped by pass and reason: `{pass, reason, places: [{module, node, source}]}`, largest group first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        for entry in record["refused"]:
            place = {key: entry[key] for key in ("module", "node", "source")}
            groups.setdefault((record["pass"], entry["reason"]), []).append(place)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [{"pass": name, "reason": reason, "places": places} for (name, reason), places in ordered]


def fold_rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each fold pass that ran: `{pass, guarantee, error, seconds, applied, refused}`.

    error: what the driver measured in float64, None where the pass changed nothing or nothing was verified.
    applied: `[{module, node, source, what, ...}]`. refused: `[{reason, places}]`, most places first.
    """
    rows = []
    for record in records:
        if record["pass"] in FOLDS:
            refused = [{k: group[k] for k in ("reason", "places")} for group in refused_groups([record])]
            kept = {key: record[key] for key in ("pass", "guarantee", "error", "seconds", "applied")}
            rows.append({**kept, "refused": refused})
    return rows


def sparsity_rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each linear that skips zeros, as `extract_sparsity` recorded it.

    `{module, node, source, pattern, density, empty_rows, empty_columns, layout, values, stored, rows, break_even,
    predicted_speedup, saved_microseconds, dense_bytes, sparse_bytes, saved_bytes, candidates}`: `stored` is the share
    of weights that the layout stores, break_even the one up to which it pays at `rows` rows of activations,
    candidates the predicted microseconds of every layout that holds the matrix. Linears with zeros that stay dense
    are among the refusals, with the same facts in words.
    """
    return [
        {key: held for key, held in entry.items() if key != "what"}
        for record in records
        if record["pass"] == "extract_sparsity"
        for entry in record["applied"]
    ]


def online_hadamards(program: Program) -> list[dict[str, Any]]:
    """Hadamard transforms left in the program: `{module, node, source, operator, orders, fused, microseconds}`.

    fused: whether the node does more (a quantizer with the transform inside), so that its time is that of both.
    microseconds: None until `add_profile`.
    """
    found = []
    for node in program.graph.nodes:
        declared = operator_of(node.target) if node.op == "call_function" else None
        if declared is None:
            continue
        alone = declared.name == "hadamard"
        name = "orders" if alone else "hadamard"
        if name not in [a.name for a in declared.overload._schema.arguments]:
            continue
        orders = [int(order) for order in argument(node, name) or ()]
        if orders:
            row = {**vars(place_of(node)), "operator": declared.name, "orders": orders}
            found.append({**row, "fused": not alone, "microseconds": None})
    return found


def add_profile(report: dict[str, Any], profile: Iterable[Mapping[str, Any]]) -> None:
    """Put measured times into `report`: `profile` has `{name, op, microseconds}` for each node that ran.

    A layer gets the time of the node that computes it; a node that computes several layers (a shared q/k/v linear) is
    split by their outputs. Also fills the times of `report["hadamards"]`, and `report["profile"]` with times by
    operator type.
    """
    nodes = [dict(entry) for entry in profile]
    by_name: dict[str, float] = {}
    by_type: dict[str, list[float]] = {}
    for entry in nodes:
        by_name[entry["name"]] = by_name.get(entry["name"], 0.0) + entry["microseconds"]
        by_type.setdefault(entry["op"], []).append(entry["microseconds"])
    for row in report["layers"]:
        spent = by_name.get(row["packed"]) if row["packed"] else None
        row["microseconds"] = None if spent is None else spent * row["share"]
    for row in report.get("hadamards", ()):
        row["microseconds"] = by_name.get(row["node"])
    report["profile"] = {
        "total_microseconds": sum(sum(times) for times in by_type.values()),
        "by_type": [
            {"op": op, "nodes": len(times), "microseconds": sum(times)}
            for op, times in sorted(by_type.items(), key=lambda item: -sum(item[1]))
        ],
        "nodes": nodes,
    }


MAKERS_OF_CODES = ("quantize_", "extract_codes")
"""How the names of passes begin that give layers codes."""


def _quantized_entries(records: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    for record in records:
        if record["pass"].startswith(MAKERS_OF_CODES):
            yield from (entry for entry in record["applied"] if "bytes_before" in entry)


def _layer_row(captured: Program, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: entry[key] for key in ("module", "node", "source", "bits", "bytes_before", "bytes_after")},
        "kind": entry.get("kind"),
        "weight": _weight_name(captured, entry),
        "shape": list(entry.get("shape", [])),
        "format": entry.get("format", "int"),
        "group_size": entry.get("group_size", 0),
        "symmetric": entry.get("symmetric", True),
        "error": entry.get("weight_error"),
        "packed": None,
        "operator": None,
        "share": 1.0,
        "microseconds": None,
        "predicted_microseconds": None,
        "limit": None,
    }


def _weight_name(captured: Program, entry: Mapping[str, Any]) -> str | None:
    """The captured tensor that an entry is about: read by its node, else the one of its shape in its module."""
    sizes = tuple(entry.get("shape", ()))
    for node in captured.graph.nodes:
        if node.name == entry["node"] or module_path(node) == entry["module"]:
            for source in node.all_input_nodes:
                held = captured.tensors.get(str(source.target)) if source.op == "get_attr" else None
                if isinstance(held, Tensor) and tuple(held.shape) == sizes:
                    return str(source.target)
    return None


def packed_nodes(program: Program) -> list[fx.Node]:
    """Nodes of the program that compute with a packed weight."""
    found = []
    for node in program.graph.nodes:
        declared = operator_of(node.target) if node.op == "call_function" else None
        if declared is not None and declared.packed_argument is not None:
            found.append(node)
    return found


def packed_bytes(program: Program, node: fx.Node) -> int:
    """Bytes of the constants that a packed operator reads, its bias left out."""
    declared = operator_of(node.target)
    assert declared is not None
    names = [
        a.name
        for a in declared.overload._schema.arguments
        if a.name in ("weight", "scale", "zero", "wsum", "table", "codebooks", "mask", "values", "offsets")
    ]
    read = [argument(node, name) for name in names]
    held = [program.tensors[str(n.target)] for n in read if isinstance(n, fx.Node) and n.op == "get_attr"]
    return sum(t.numel() * t.element_size() for t in held)


def _attach_packed(captured: Program, program: Program, rows: list[dict[str, Any]]) -> None:
    """Name the node that computes each row; a layer merged into a wider one is found by its weights' values."""
    free = {node: packed_bytes(program, node) for node in packed_nodes(program)}
    lost: list[dict[str, Any]] = []
    for row in rows:
        alike = [n for n in free if module_path(n) == row["module"] and _outputs(n) == _rows(row)]
        if len(alike) == 1:
            _attach(row, alike[0], 1.0, free.pop(alike[0]))
        else:
            lost.append(row)
    matrices = {node: decoded(program, node) for node in free} if lost else {}
    for row in lost:
        weight = captured.tensors.get(str(row["weight"]))
        if not isinstance(weight, Tensor):
            continue
        flat = (weight.detach().flatten(0, 1) if _has_experts(row) else weight.detach().flatten(1)).float()
        for node, matrix in matrices.items():
            if weight_inside(matrix, flat) is not None:
                share = flat.shape[0] / matrix.shape[0]
                _attach(row, node, share, round(free[node] * share))
                break


def _attach(row: dict[str, Any], node: fx.Node, share: float, size: int) -> None:
    declared = operator_of(node.target)
    assert declared is not None
    row.update(packed=node.name, operator=declared.name, share=share, bytes_after=size)


def _has_experts(row: Mapping[str, Any]) -> bool:
    """Whether a row's weight is a matrix for each expert."""
    return row["kind"] == "weights" and len(row["shape"]) == 3


def _rows(row: Mapping[str, Any]) -> int | None:
    return row["shape"][1 if _has_experts(row) else 0] if row["shape"] else None


def _outputs(node: fx.Node) -> int | None:
    """Rows of the matrix that a packed node reads; None where it holds two (gated)."""
    declared = operator_of(node.target)
    assert declared is not None
    names = [a.name for a in declared.overload._schema.arguments]
    if "n" in names:
        return None if "gated" in names and argument(node, "gated") else int(argument(node, "n"))
    fake = value(argument(node, "weight"))
    return int(fake.shape[0])


def _model(captured: Program) -> dict[str, Any]:
    def described(node: fx.Node) -> dict[str, Any]:
        fake = value(node)
        if not isinstance(fake, Tensor):
            return {"name": node.name, "shape": None, "dtype": type(fake).__name__}
        sizes = [size if isinstance(size, int) else str(size) for size in fake.shape]
        return {"name": node.name, "shape": sizes, "dtype": str(fake.dtype).removeprefix("torch.")}

    roots = [
        entry
        for n in captured.graph.nodes
        for entry in list((n.meta.get("nn_module_stack") or {}).values())[:1]
    ]
    kinds = [
        kind if isinstance(kind, str) else kind.__qualname__
        for path, kind in roots
        if path in ("", "L['self']")
    ]
    return {
        "name": kinds[0].rpartition(".")[2] if kinds else "Program",
        "inputs": [described(node) for node in captured.placeholders],
        "outputs": [described(node) for node in captured.outputs],
    }


def _totals(captured: Program, program: Program, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    floating = [t for t in captured.parameters.values() if t.is_floating_point()]
    quantized = sum(row["bytes_before"] for row in rows)
    # A tensor of several layers (tied embeddings) is quantized for each of them, so each counts.
    again = quantized - sum({row["weight"] or row["node"]: row["bytes_before"] for row in rows}.values())
    weights = sum(t.numel() * t.element_size() for t in floating) + again
    return {
        "parameters": sum(t.numel() for t in floating),
        "weight_bytes_before": captured.weight_bytes,
        "weight_bytes_after": program.weight_bytes,
        "quantized_share": quantized / weights if weights else 0.0,
        "operators_before": captured.operator_count,
        "operators_after": program.operator_count,
    }
