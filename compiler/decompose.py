"""An operator written in terms of simpler ones, by torch's own decompositions.

Composite operators of ATen (`fft_rfft`, `one_hot`, `cross_entropy_loss`) are taken apart by what autograd does with
them, others by the table of torch's decompositions. Sizes may be symbolic: they stay expressions of the inputs' sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .editor import Editor
from .graph import fake_mode_of, value

aten = torch.ops.aten


def is_composite(target: Any) -> bool:
    """Whether an operator has no kernel of its own."""
    return isinstance(target, torch._ops.OpOverload) and target._can_decompose()


def decompose(editor: Editor, node: fx.Node) -> list[fx.Node] | None:
    """Replace a call by simpler ones, one level down. Returns the new nodes, None where torch knows none.

    Results of several tensors keep their `getitem`s.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if not is_composite(target) and target not in decomposition_table:
        return None
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec
        )
        return target(*args, **kwargs)

    table = {} if is_composite(target) else {target: decomposition_table[target]}
    # With oneDNN a recurrent layer would become oneDNN's own.
    plain = torch.backends.mkldnn.flags(enabled=False)
    try:
        with fake_mode_of(editor.graph), enable_python_dispatcher(), torch.no_grad(), plain:
            traced = make_fx(call, decomposition_table=table)(*map(value, sources))
    except Exception:  # whatever a decomposition raises, it is not one for these arguments
        return None
    inner = [n for n in traced.graph.nodes if n.op == "call_function"]
    if any(n.target == target or _is_foreign(n) for n in inner):
        return None
    if any(n.op == "get_attr" for n in traced.graph.nodes):
        return None
    return _inlined(editor, node, traced.graph, sources)


def _inlined(editor: Editor, node: fx.Node, graph: fx.Graph, sources: list[fx.Node]) -> list[fx.Node]:
    mapping: dict[fx.Node, Any] = {}
    given = iter(sources)
    made: list[fx.Node] = []
    for inner in graph.nodes:
        if inner.op == "placeholder":
            mapping[inner] = next(given)
        elif inner.op == "call_function" and not _is_assertion(inner):
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), lambda n: mapping[n])
            mapping[inner] = editor.call(_functional(inner.target), *args, like=node, **kwargs)
            made.append(mapping[inner])
        elif inner.op == "output":
            results = pytree.tree_map(
                lambda leaf: mapping[leaf] if isinstance(leaf, fx.Node) else leaf, inner.args[0]
            )
    _replace(editor, node, results)
    return [n for n in made if not n._erased]


def _functional(target: Any) -> Any:
    """The operator that copies where `target` writes or views.

    Whether a reshape is a view depends on strides, and the traced ones hold for the example sizes only.
    """
    if target == aten.view.default:
        return aten.reshape.default
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"))
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
            return overload
    return target


def _is_foreign(node: fx.Node) -> bool:
    """Whether it calls an operator of torch's other set of primitives, which nothing here knows."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"


def _is_assertion(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _replace(editor: Editor, node: fx.Node, results: Any) -> None:
    if isinstance(value(node), Tensor):
        editor.replace(node, results)
        return
    for user in list(node.users):
        editor.replace(user, results[user.args[1]])
    if not node._erased:
        editor.erase(node)
