"""Custom operators with a kernel in Python become the ATen calls that the kernel makes.

    quantize_affine(x, ...)  →  _to_copy(clamp(round(x * reciprocal(s)) + z, lo, hi), int8)

What a kernel is, how it is read, and what is refused: `compiler/python_kernel.py`. Operators of ATen, of PyTorch's
prims and of isofold stay, but for `torch.fake_quantize_*`, which are spelled out. Exactness: bitwise in the program's
own types; the float64 comparison runs the same graph, as many such kernels refuse float64.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from ..editor import Editor
from ..passes import Guarantee, define_pass
from ..python_kernel import Kernels, is_custom
from .match import is_call


@define_pass(Guarantee.REAL)
def expand_custom_operators(editor: Editor) -> None:
    """See the module."""
    kernels = Kernels()
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node._erased or not is_custom(node.target) or not node.users:
            continue
        traced = kernels.trace(node)
        if isinstance(traced, str):
            editor.refused(node, f"{node.target}: {traced}")
            continue
        editor.applied(node, f"{node.target} is what its kernel computes")
        _splice(editor, node, traced)


def _splice(editor: Editor, node: fx.Node, traced: fx.GraphModule) -> None:
    """Insert the graph in front of the call, and let the call's readers read its results."""
    inputs = iter(list(node.all_input_nodes))
    known: dict[fx.Node, fx.Node] = {}
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            known[inner] = next(inputs)
        elif inner.op == "get_attr":
            held = getattr(traced, str(inner.target)).clone()  # the graph serves all equal calls
            known[inner] = editor.constant(held, f"{node.name}_constant")
        elif inner.op == "call_function":
            args, kwargs = map_arg((inner.args, inner.kwargs), known.__getitem__)
            known[inner] = editor.call(inner.target, *args, like=node, **kwargs)
        else:
            _replace(editor, node, map_arg(inner.args[0], known.__getitem__))
    for new in reversed(known.values()):
        if not new._erased and not new.users and new.op == "call_function":
            editor.erase(new)


def _replace(editor: Editor, node: fx.Node, results: Any) -> None:
    if isinstance(results, fx.Node):
        editor.replace(node, results)
        return
    for user in list(node.users):
        assert is_call(user, operator.getitem), f"{user} reads all results of {node}"
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(results[index], propagate_meta=False)
        editor.graph.erase_node(user)
    editor.erase(node)
