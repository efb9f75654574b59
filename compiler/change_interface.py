"""Inputs and outputs that become several: the one place where a pass changes what a program is called with.

    f(x, past)  →  y, present          becomes          f(x, (codes, pairs))  →  y, (codes, pairs)

A leaf of the structure of arguments or results becomes a tuple in its place, and all that is aligned with it (example
inputs, dynamic sizes) with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .editor import Editor
from .errors import UnsupportedError


def split_inputs(
    editor: Editor, parts: Mapping[fx.Node, Mapping[str, Tensor]]
) -> dict[fx.Node, list[fx.Node]]:
    """New inputs in front of each placeholder of `parts`, named `<input>_<part>`, with these example values.

    The old placeholders stay until `drop_inputs`, so that a pass can move their readers. Sizes that vary in the old
    input vary in the new ones (all but the last).
    """
    made: dict[fx.Node, list[fx.Node]] = {}
    for old, examples in parts.items():
        made[old] = []
        fake = old.meta["val"]
        for part, example in examples.items():
            with editor.graph.inserting_before(old):
                node = editor.graph.placeholder(f"{old.name}_{part}")
            node.meta.update({key: held for key, held in old.meta.items() if key != "val"})
            node.meta["val"] = fake.new_empty([*fake.shape[:-1], example.shape[-1]], dtype=example.dtype)
            made[old].append(node)
    return made


def drop_inputs(editor: Editor, parts: Mapping[fx.Node, Mapping[str, Tensor]]) -> None:
    """Erase placeholders that `split_inputs` has replaced: structure, examples and dynamic sizes follow."""
    codegen = editor.graph._codegen
    assert isinstance(codegen, fx.graph._PyTreeCodeGen), (
        "captured programs carry the structure of their arguments"
    )
    info = codegen.pytree_info
    olds = [n for n in editor.graph.nodes if n.op == "placeholder"]
    new_nodes = {f"{old.name}_{part}" for old, examples in parts.items() for part in examples}
    olds = [node for node in olds if node.name not in new_nodes]
    counts = [len(parts[node]) if node in parts else 0 for node in olds]
    leaves = pytree.tree_leaves((editor.example_args, editor.example_kwargs), is_leaf=lambda v: v is None)
    values: list[Any] = []
    for node, leaf in zip(olds, leaves, strict=True):
        values.extend(parts[node].values() if node in parts else [leaf])
    spec = _split(info.in_spec, iter(counts))
    editor.dynamic_shapes = _spread_dims(info.in_spec, list(info.orig_args), editor.dynamic_shapes, counts)
    args, kwargs = pytree.tree_unflatten(values, spec)
    editor.example_args, editor.example_kwargs = tuple(args), dict(kwargs)
    codegen.pytree_info = info._replace(in_spec=spec)
    for node in parts:
        editor.graph.erase_node(node)


def split_outputs(editor: Editor, parts: Mapping[int, Sequence[fx.Node]]) -> None:
    """The outputs with these numbers become tuples of nodes."""
    output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
    old: list[Any] = list(output.args[0])  # exported programs return a flat sequence
    counts = [len(parts.get(i, ())) for i in range(len(old))]
    new = [node for i, leaf in enumerate(old) for node in parts.get(i, (leaf,))]
    codegen = editor.graph._codegen
    assert isinstance(codegen, fx.graph._PyTreeCodeGen)
    info = codegen.pytree_info
    assert info.out_spec is not None
    codegen.pytree_info = info._replace(out_spec=_split(info.out_spec, iter(counts)))
    output.args = (tuple(new),)


def _split(spec: pytree.TreeSpec, counts: Iterator[int]) -> pytree.TreeSpec:
    """The structure with a tuple of that many leaves in place of each leaf; 0: it stays a leaf."""
    if spec.is_leaf():
        count = next(counts)
        return pytree.tree_structure((0,) * count) if count else spec
    children = [_split(child, counts) for child in spec.children()]
    return pytree.TreeSpec(spec.type, spec.context, children)


def _spread_dims(spec: pytree.TreeSpec, names: Sequence[str], shapes: Any, counts: Sequence[int]) -> Any:
    """Dynamic shapes as they were declared, with a tuple in place of each leaf that is split."""
    if shapes is None:
        return None
    args, kwargs = spec.children()
    specs = [*args.children(), *kwargs.children()]
    keys = [*names[: len(args.children())], *(kwargs.context or ())]
    left = iter(counts)
    if isinstance(shapes, Mapping):
        spread = {key: _spread(inner, shapes.get(key), left) for key, inner in zip(keys, specs, strict=True)}
        return {key: spread[key] for key in spread if key in shapes}
    return tuple(_spread(inner, dims, left) for inner, dims in zip(specs, shapes, strict=True))


def _spread(spec: pytree.TreeSpec, dims: Any, counts: Iterator[int]) -> Any:
    if spec.is_leaf():
        count = next(counts)
        return (dims,) * count if count else dims
    inner: Callable[[pytree.TreeSpec, Any], Any] = lambda child, given: _spread(child, given, counts)  # noqa: E731
    if dims is None:
        for child in spec.children():
            inner(child, None)
        return None
    if isinstance(dims, (tuple, list)) and len(dims) == len(spec.children()):
        return type(dims)([inner(child, given) for child, given in zip(spec.children(), dims, strict=True)])
    if isinstance(dims, Mapping) and isinstance(spec.context, list):
        return {
            key: inner(child, dims.get(key)) for key, child in zip(spec.context, spec.children(), strict=True)
        }
    raise UnsupportedError(
        "The dynamic sizes of the model's caches are not given in the structure of its arguments",
        expected=f"{len(spec.children())} entries in a tuple, list or dict",
        got=repr(dims),
        hint="pass caches in tuples, lists or dicts, and dynamic_shapes likewise",
    )
