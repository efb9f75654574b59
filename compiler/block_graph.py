"""The graph at the level of blocks: what a person would draw of a model on a whiteboard.

A block is a module: the innermost module on a node's path that is an element of a list (`layers.3`), else the path cut
after two names. Neighbouring elements of one list that hold the same operators become one block with a
count. A container's own nodes are split into those that run before and after the blocks in it, so that masks and
final norms do not tie the graph into a knot. Only tensors make edges. One element of the longest list is also drawn
operator by operator, as it is after all passes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from .dialect.operator import operator_of
from .graph import module_class, module_path, value
from .program import Program

_DETAIL_LIMIT = 80
"""Operators in the detailed picture; a larger block is not drawn."""
_END = " (end)"
"""Marks the part of a container that runs after the blocks in it."""


def block_graph(captured: Program, program: Program) -> dict[str, Any]:
    """The graph of blocks of a compiled program as JSON-like values.

    nodes: `{id, label, kind, count, operators_before, operators_after, bytes_after, modules}`, in order of execution;
        kind is `input | block | output`; operators and bytes are summed over the `count` modules.
    edges: pairs of ids.
    detail: None, or one repeated block after all passes: `title`, nodes `{id, label, kind, where, class}` with kind
        `operator | dialect | packed | outside`, and edges.
    """
    blocks = _assign(program)
    before = Counter(block for node, block in _assign(captured).items() if _computes(node))
    merged = _merge_repeated(program, blocks)
    nodes = _nodes(program, blocks, merged, before)
    edges = sorted({(merged[blocks[a]], merged[blocks[b]]) for a, b in _dataflow(blocks)})
    return {
        "nodes": nodes,
        "edges": [[a, b] for a, b in edges if a != b],
        "detail": _detail(program, blocks, merged),
    }


def _block_of(path: str) -> str:
    """The block of a module path: up to the last list index, else the first two names."""
    names = path.split(".") if path else []
    indices = [i for i, name in enumerate(names) if name.isdigit()]
    if not indices:
        return ".".join(names[:2])
    # A list inside a list element (`layers.0.experts.3`) is part of the element.
    return ".".join(names[: indices[0] + 1])


def _assign(program: Program) -> dict[fx.Node, str]:
    """Block id of every node that computes something, and of inputs and the output."""
    blocks: dict[fx.Node, str] = {}
    behind: dict[fx.Node, frozenset[str]] = {}
    for node in program.graph.nodes:
        sources = [behind[source] for source in node.all_input_nodes if source in behind]
        reached = frozenset().union(*sources)
        if node.op.startswith("call"):
            home = _block_of(module_path(node))
            inside = [b for b in reached if b != home and (not home or b.startswith(f"{home}."))]
            blocks[node] = f"{home or '(model)'}{_END if inside else ''}"
            behind[node] = reached | {home}
        elif node.op == "placeholder":
            blocks[node] = f"input {node.target}"
        elif node.op == "output":
            blocks[node] = "output"
    return blocks


def _dataflow(blocks: dict[fx.Node, str]) -> Iterable[tuple[fx.Node, fx.Node]]:
    for node in blocks:
        yield from (
            (source, node) for source in node.all_input_nodes if source in blocks and _is_tensor(source)
        )


def _computes(node: fx.Node) -> bool:
    return node.op.startswith("call") and node.target is not operator.getitem


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), (Tensor, tuple, list))


def _merge_repeated(program: Program, blocks: dict[fx.Node, str]) -> dict[str, str]:
    """block → representative: elements of one list that follow each other and hold the same operators share one."""
    operators: dict[str, Counter[str]] = {}
    for node, block in blocks.items():
        operators.setdefault(block, Counter())[
            str(node.target) if node.op.startswith("call") else node.name
        ] += 1
    merged: dict[str, str] = {}
    previous: dict[str, str] = {}
    for block in operators:
        parent, _, last = block.rpartition(".")
        alike = previous.get(parent) if last.isdigit() else None
        merged[block] = merged[alike] if alike and operators[alike] == operators[block] else block
        if last.isdigit():
            previous[parent] = block
    return merged


def _nodes(
    program: Program, blocks: dict[fx.Node, str], merged: dict[str, str], before: Counter[str]
) -> list[dict[str, Any]]:
    nodes: dict[str, dict[str, Any]] = {}
    counted: set[str] = set()
    for node, block in blocks.items():
        entry = nodes.setdefault(
            merged[block],
            {
                "id": merged[block],
                "kind": {"placeholder": "input", "output": "output"}.get(node.op, "block"),
                "modules": [],
                "operators_before": 0,
                "operators_after": 0,
                "bytes_after": 0,
            },
        )
        if block not in entry["modules"]:
            entry["modules"].append(block)
            entry["operators_before"] += before[block]
        entry["operators_after"] += _computes(node)
        for source in node.all_input_nodes:
            held = program.tensors.get(str(source.target)) if source.op == "get_attr" else None
            if isinstance(held, Tensor) and str(source.target) not in counted:
                counted.add(str(source.target))
                entry["bytes_after"] += held.numel() * held.element_size()
    for entry in nodes.values():
        entry["count"] = len(entry["modules"])
        entry["label"] = _label(entry["modules"])
    return list(nodes.values())


def _label(modules: list[str]) -> str:
    if len(modules) == 1:
        return modules[0]
    return f"{modules[0]} … {modules[-1].rpartition('.')[2]}"


def _detail(program: Program, blocks: dict[fx.Node, str], merged: dict[str, str]) -> dict[str, Any] | None:
    """The operators of a typical element (the second) of the longest list, and what enters it."""
    sizes = Counter(blocks.values())
    lists = Counter(
        representative for block, representative in merged.items() if block.rpartition(".")[2].isdigit()
    )
    if not lists:
        return None
    longest = max(lists, key=lambda block: (lists[block], sizes[block]))
    chosen = [block for block, representative in merged.items() if representative == longest][:2][-1]
    inside = [node for node, block in blocks.items() if block == chosen]
    if len(inside) > _DETAIL_LIMIT:
        return None
    kept = set(inside)
    nodes = {node: _operator_entry(node, chosen) for node in inside if _computes(node) and _is_tensor(node)}
    edges: set[tuple[str, str]] = set()
    for target in inside:
        if target not in nodes:
            continue
        for source in _through_getitem(target):
            if source not in kept:
                nodes.setdefault(source, _outside_entry(source, blocks.get(source, "")))
            edges.add((source.name, target.name))
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    return {
        "title": chosen,
        "nodes": [entry for _, entry in sorted(nodes.items(), key=lambda item: order[item[0]])],
        "edges": [list(edge) for edge in sorted(edges)],
    }


def _through_getitem(node: fx.Node) -> list[fx.Node]:
    sources = []
    for source in node.all_input_nodes:
        while source.target is operator.getitem:
            source = source.all_input_nodes[0]
        if source.op != "get_attr" and _is_tensor(source):
            sources.append(source)
    return sources


def _operator_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _operator_entry(node: fx.Node, block: str) -> dict[str, Any]:
    declared = operator_of(node.target)
    packed = declared is not None and declared.packed_argument is not None
    return {
        "id": node.name,
        "label": _operator_name(node),
        "kind": "packed" if packed else "dialect" if declared else "operator",
        "where": module_path(node).removeprefix(block).lstrip("."),
        "class": module_class(node).rpartition(".")[2],
    }


def _outside_entry(node: fx.Node, block: str) -> dict[str, Any]:
    return {"id": node.name, "label": block or node.name, "kind": "outside", "where": "", "class": ""}
