"""A program's interface: names and structure of its inputs and outputs, names of its dynamic sizes.

Every runtime writes these into its artefacts, so that arguments mean the same whichever one was compiled for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .graph import value
from .program import Program
from .structure import Leaf, Structure, encode, leaf_names


def output_structure(program: Program) -> Structure:
    """Structure of the results; tensors are numbered in the order of the outputs."""
    leaves: list[Any] = []
    count = 0
    for leaf in pytree.tree_leaves(program.output_node.args[0], is_leaf=lambda v: v is None):
        if isinstance(leaf, fx.Node):
            leaves.append(Leaf(count, integer=not isinstance(value(leaf), torch.Tensor)))
            count += 1
        else:
            leaves.append(leaf)
    return encode(program.unflatten_outputs(leaves))


def input_names(program: Program) -> list[str]:
    """Names of the inputs: the placeholders that are tensors."""
    return [node.name for node in program.placeholders if isinstance(value(node), torch.Tensor)]


def output_names(program: Program) -> list[str]:
    """Names of the outputs."""
    names = leaf_names(output_structure(program), "output")
    return [names[index] for index in sorted(names)]


def input_structure(program: Program) -> dict[str, Any]:
    """`{"names": [...], "args": [...], "kwargs": {...}}`: tensors are numbered in the order of the inputs."""
    codegen = program.graph._codegen
    leaves: list[Any] = []
    count = 0
    for node in program.placeholders:
        fake = value(node)
        if isinstance(fake, torch.Tensor):
            leaves.append(Leaf(count))
            count += 1
        else:
            leaves.append(fake)
    assert isinstance(codegen, fx.graph._PyTreeCodeGen), (
        "captured programs carry the structure of their arguments"
    )
    args, kwargs = pytree.tree_unflatten(leaves, codegen.pytree_info.in_spec)
    return {
        "names": list(codegen.pytree_info.orig_args)[: len(args)],
        "args": [encode(a) for a in args],
        "kwargs": {key: encode(v) for key, v in kwargs.items()},
    }


def dimension_names(program: Program, sizes: Mapping[str, Sequence[Any]] | None = None) -> dict[str, str]:
    """torch's symbols (`s77`) → names of the Dims the user declared, else input and axis.

    sizes: shapes of the inputs by name where their symbols are not the program's own (torch.export names them anew when
    the structure of arguments has changed).
    """
    declared = _declared_dims(program)
    names: dict[str, str] = {}
    for node, dims in zip(program.placeholders, declared, strict=True):
        fake = value(node)
        own = fake.shape if isinstance(fake, torch.Tensor) else ()
        for axis, size in enumerate(own if sizes is None else sizes.get(node.name, ())):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier():
                continue
            wanted = dims.get(axis) if isinstance(dims, Mapping) else None
            name = getattr(wanted, "__name__", None)
            if name is None or name in names.values():
                name = None if symbol in names else f"{node.name}_{axis}"
            if name is not None:
                names.setdefault(symbol, name)
    return names


def _declared_dims(program: Program) -> list[Any]:
    """The dynamic shapes in the order of the placeholders, None where nothing fits them."""
    nothing: list[Any] = [None] * len(program.placeholders)
    if program.dynamic_shapes is None:
        return nothing
    arguments = (program.example_args, program.example_kwargs)
    shapes = program.dynamic_shapes
    ordered = list(shapes.values()) if isinstance(shapes, Mapping) else list(shapes)
    given = [*arguments[0], *arguments[1].values()]
    flat = [leaf for value_, dims in zip(given, ordered, strict=False) for leaf in _aligned(value_, dims)]
    return flat if len(flat) == len(nothing) else nothing


def _aligned(given: Any, dims: Any) -> list[Any]:
    """The dynamic sizes of each leaf of an argument."""
    if isinstance(given, (tuple, list)) and isinstance(dims, (tuple, list)) and len(given) == len(dims):
        return [leaf for inner in zip(given, dims, strict=True) for leaf in _aligned(*inner)]
    if isinstance(given, Mapping) and isinstance(dims, Mapping) and set(dims) <= set(given):
        return [leaf for key, inner in given.items() for leaf in _aligned(inner, dims.get(key))]
    count = len(pytree.tree_leaves(given))
    return [dims] if count == 1 else [None] * count


def cache_facts(program: Program) -> list[dict[str, Any]]:
    """What a caller needs to know of the caches that are codes (`Program.caches`), for artefacts and reports.

    `{kind, was, inputs, outputs, heads, head_size, bits, group, token_bytes, float_bytes, hadamard, scale}`: names of
    the inputs and of the outputs of codes and of pairs; was: the input of floats; group: dimensions of a head that
    share a pair, 0: all; token_bytes: of all heads of one token, codes and pairs, float_bytes: what it was; hadamard
    and scale: what the floats go through first.
    """
    names = output_names(program)
    inputs = {node.name: value(node) for node in program.placeholders}
    return [
        {
            "kind": cache.kind,
            "was": cache.name,
            "inputs": list(cache.inputs),
            "outputs": names[cache.output : cache.output + 2],
            "heads": int(inputs[cache.inputs[0]].shape[1]),
            "head_size": cache.depth,
            "bits": cache.bits,
            "group": cache.group,
            "token_bytes": sum(_token_bytes(inputs[name]) for name in cache.inputs),
            "float_bytes": 4 * int(inputs[cache.inputs[0]].shape[1]) * cache.depth,
            "hadamard": list(cache.hadamard),
            "scale": list(cache.scale),
        }
        for cache in program.caches
    ]


def _token_bytes(held: torch.Tensor) -> int:
    """Bytes of one token of `[B, H, T, ...]`."""
    return int(held.shape[1]) * int(held.shape[3]) * held.element_size()
