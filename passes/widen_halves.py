"""Models of half precision are computed in float32, as the kernels of both CPU runtimes are.

    every tensor and every dtype argument:   float16, bfloat16   →   float32

REAL: every half is a float32, and what rounded between two operators no longer does, so results are nearer to those of
the real numbers. All that reads float32 models (canonical forms, quantizers, fusions) then reads these, too.

Inputs and outputs of float16 keep their type and are cast. Those of bfloat16 become float32, as NumPy has no bfloat16;
opened artefacts take tensors of bfloat16 for them. A program that looks at the bits of halves is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..compiler.editor import Editor
from ..compiler.graph import dtype
from ..compiler.passes import Guarantee, define_pass
from ..compiler.program import Program

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)


def has_halves(program: Program) -> bool:
    """Whether something in the program is of half precision."""
    return any(dtype(node) in HALVES for node in program.graph.nodes)


@define_pass(Guarantee.REAL)
def widen_halves(editor: Editor) -> None:
    """See the module."""
    bitcasts = [n for n in editor.calls(aten.view.dtype) if {dtype(n), dtype(_first(n))} & {*HALVES}]
    if bitcasts:
        for node in bitcasts:
            editor.refused(node, "it takes halves for the bits of another type")
        return
    results = [(node, dtype(node)) for node in editor.program.outputs]
    count = 0
    for name, held in editor.tensors.items():
        if isinstance(held, Tensor) and held.dtype in HALVES:
            editor.set_tensor(name, held.detach().float())
            count += 1
    for node in editor.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_widened, (node.args, node.kwargs))
    inputs = list(_widen_inputs(editor))
    editor.refresh_all()
    _narrow_outputs(editor, [kind for _, kind in results])
    changed = f"; inputs {', '.join(inputs)} are float32" if inputs else ""
    editor.applied(editor.program.output_node, f"{count} tensors become float32{changed}", tensors=count)


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _widened(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in HALVES else argument


def _widen_inputs(editor: Editor) -> Iterator[str]:
    """Casts behind inputs of float16; names of those of bfloat16, which change."""
    for node in [n for n in editor.graph.nodes if n.op == "placeholder"]:
        if dtype(node) == torch.float16:
            readers = list(node.users)
            with editor.graph.inserting_after(node):
                cast = editor.graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
            for reader in readers:
                reader.replace_input_with(node, cast)
        elif dtype(node) == torch.bfloat16:
            node.meta["val"] = node.meta["val"].float()
            yield node.name

    def example(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf

    editor.example_args, editor.example_kwargs = pytree.tree_map(
        example, (editor.example_args, editor.example_kwargs)
    )


def _narrow_outputs(editor: Editor, wanted: list[torch.dtype | None]) -> None:
    """Casts of the outputs that were float16."""
    output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
    kinds = iter(wanted)

    def narrowed(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node) or next(kinds) != torch.float16 or dtype(leaf) == torch.float16:
            return leaf
        return editor.call(aten._to_copy.default, leaf, like=output, dtype=torch.float16)

    output.args = pytree.tree_map(narrowed, output.args)
