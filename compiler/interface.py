"""A program's interface: names and structure of its inputs and outputs, names of its dynamic sizes.

Every runtime writes these into its artefacts, so that arguments mean the same whichever one was compiled for.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def dimension_names(program: Program) -> dict[str, str]:
    """torch's symbols (`s77`) → names of the Dims the user declared, else input and axis."""
    declared = _declared_dims(program)
    names: dict[str, str] = {}
    for node, dims in zip(program.placeholders, declared, strict=True):
        fake = value(node)
        for axis, size in enumerate(fake.shape if isinstance(fake, torch.Tensor) else ()):
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
    flat: list[Any] = []
    for given, dims in zip([*arguments[0], *arguments[1].values()], ordered, strict=False):
        if isinstance(given, (tuple, list)) and isinstance(dims, (tuple, list)):
            flat.extend(dims)
        else:
            flat.extend(
                [dims] if len(pytree.tree_leaves(given)) == 1 else [None] * len(pytree.tree_leaves(given))
            )
    return flat if len(flat) == len(nothing) else nothing
