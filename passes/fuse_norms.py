"""A norm, the residual sum before it and the quantizer after it become one pass over the rows.

    s = x + r,  y = norm(s),  (u, params) = quantize(y)   → (s, y, u, params) = norm_quantize(x, r)
    s = x + r,  y = norm(s)                               → (s, y) = norm(x, r)

Each row stays in the cache from the sum to the codes, and results that nobody reads are not written. Where several
norms read one sum, the first computes it and the others read it.

The quantizer keeps its width, and its shift and scale, which y itself does not see.

Side conditions: the norm is over the last dimension alone, in float32. A sum is taken where both sides have one shape
and alpha = 1, and everything else that reads it can come later. Of quantizers that differ (another static range or
padding, another shift), the one with the most readers is taken; the others stay.

Exactness: REAL; the norm is the same formula with another order of roundings, the quantizer the same operator.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..compiler.canonicalize.match import equal_shapes, is_call
from ..compiler.dialect import norm, norm_quantize, quantize_activation, quantize_activation_fp8
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, shape
from ..compiler.passes import Guarantee, define_pass

aten = torch.ops.aten
_KINDS: dict[object, str] = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}


@define_pass(Guarantee.REAL)
def fuse_norms(editor: Editor) -> None:
    """See the module."""
    for node in editor.calls(*_KINDS):
        reason = _reason_against(node)
        if reason is not None:
            editor.refused(node, reason)
        else:
            _fuse(editor, node)


def _reason_against(node: fx.Node) -> str | None:
    if len(argument(node, "normalized_shape")) != 1:
        return f"it is over the last {len(argument(node, 'normalized_shape'))} dimensions together"
    if dtype(node) != torch.float32:
        return f"it computes in {dtype(node)}, not float32"
    return None


def _fuse(editor: Editor, node: fx.Node) -> None:
    x = argument(node, "input")
    weight = argument(node, "weight")
    bias = argument(node, "bias") if node.target == aten.layer_norm.default else None
    eps = argument(node, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    kind = _KINDS[node.target]
    quantizer = _quantizer(editor, node)
    wanted = ("params", "align", "shift", "scale", "bits", "hadamard")
    given = {name: None if quantizer is None else argument(quantizer, name) for name in wanted}
    params, align = given.pop("params"), given.pop("align")
    summands, anchor = _summands(editor, node, x, [weight, bias, params, *given.values()])
    operands = (*summands, weight, bias)
    if quantizer is None:
        new = editor.call(norm.overload, *operands, eps, kind, like=node, before=anchor)
    else:
        rest = (params, eps, kind, align, *given.values())
        new = editor.call(norm_quantize.overload, *operands, *rest, like=node, before=anchor)
        _redirect(editor, quantizer, new, {0: 2, 1: 3}, anchor)
    if summands[1] is not None and len(x.users) > 1:
        total = editor.call(operator.getitem, new, 0, like=x, before=anchor)
        x.replace_all_uses_with(total, propagate_meta=False)
    if node.users:
        editor.replace(node, editor.call(operator.getitem, new, 1, like=node, before=anchor))
    else:
        editor.erase(node)
    if not x._erased and not x.users and x.op == "call_function":
        editor.erase(x)
    parts = (["residual sum"] if summands[1] is not None else []) + [f"{kind} norm"]
    parts += [] if quantizer is None else ["quantizer"]
    editor.applied(new, " + ".join(parts) + " in one pass")


def _quantizer(editor: Editor, node: fx.Node) -> fx.Node | None:
    """The quantizer of the norm's result that most operators read, or None."""
    found = [user for user in node.users if is_call(user, quantize_activation.overload)]
    for other in node.users:
        if is_call(other, quantize_activation_fp8.overload):
            editor.refused(other, "its codes are FP8, and norms that quantize make integers")
    found.sort(key=lambda q: -sum(len(part.users) for part in q.users))
    for other in found[1:]:
        editor.refused(
            other, "another quantizer of this norm's result, with more readers, is a part of the norm"
        )
    return found[0] if found else None


def _summands(
    editor: Editor, node: fx.Node, x: fx.Node, needed: list[Any]
) -> tuple[tuple[fx.Node, fx.Node | None], fx.Node]:
    """The norm's input as (x, residual), and before which node the fused call goes."""
    if not is_call(x, aten.add.Tensor) or not all(isinstance(a, fx.Node) for a in x.args[:2]):
        return (x, None), node
    first, second = x.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    if argument(x, "alpha") != 1 or not (equal_shapes(first, x) and equal_shapes(second, x)):
        sizes = [[str(s) for s in shape(a) or ()] for a in (first, second)]
        editor.refused(x, f"the sum before the norm broadcasts {sizes[0]} and {sizes[1]}, or scales one side")
        return (x, None), node
    anchor = min(x.users)
    if any(isinstance(a, fx.Node) and not a < anchor for a in needed):
        editor.refused(x, "the sum is read before the norm's parameters are there")
        return (x, None), node
    return (first, second), anchor


def _redirect(editor: Editor, old: fx.Node, new: fx.Node, positions: dict[int, int], anchor: fx.Node) -> None:
    """Let readers of the parts of `old` read parts of `new`, and erase `old`."""
    parts: dict[int, fx.Node] = {}
    for part in list(old.users):
        at = positions[int(part.args[1])]  # type: ignore[arg-type]  # a number, by getitem
        if at not in parts:
            parts[at] = editor.call(operator.getitem, new, at, like=part, before=anchor)
        part.replace_all_uses_with(parts[at], propagate_meta=False)
    for part in list(old.users):
        editor.graph.erase_node(part)
    editor.graph.erase_node(old)
