"""Online Hadamard transforms on edges, the inverse folded into what reads them.

    x W^T = (x H)(W H)^T                                       linears: all chosen readers of x share one transform
    softmax(q k^T) v = softmax((q H)(k H)^T) v                 attention, per head: after rotary, so on its own edges

H is orthogonal, so both hold over the reals whatever produced x, q and k: where the space of x cannot turn as a
whole (an activation function, a gain on the residual path, rotary pairs), its readers still can. An outlier channel
is spread evenly over its block before it is quantized, for n log n additions per row that the activation quantizer's
kernel takes in (`fuse_quantizer_inputs`); nothing else that reads x sees the transform.

With a seed, H = diag(signs) H: without them the channels' common mean (behind a GELU, say) would gather in the first
channel. The signs are a product in front of the transform, or in the one that already is there.

Side conditions: a linear's weight is a constant, of floats; the value is not quantized yet; the size is a multiple of
a known order (even). An attention turns both q and k or neither. A weight that others read too keeps its old form
for those.

Exactness: REAL; W H in float64, rounded once. The transform itself rounds at run time like any product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.canonicalize.match import vector
from ..compiler.dialect import dequantize_cache, hadamard, linear_grouped
from ..compiler.editor import Editor
from ..compiler.errors import InputError
from ..compiler.graph import argument, dtype, module_path, shape, static_size, value
from ..compiler.hadamard import apply_hadamard, steps
from ..compiler.hadamard_orders import factor
from ..compiler.passes import Guarantee, define_pass
from .layers import ROUNDERS, is_call_of, set_argument

aten = torch.ops.aten
LINEARS = (aten.linear.default, linear_grouped.overload)
ATTENTION = aten.scaled_dot_product_attention.default

Chosen = Collection[str] | Callable[[fx.Node], bool]
"""Which calls: names of their nodes, or a predicate."""

_ELEMENTS_AT_ONCE = 1 << 22


@define_pass(Guarantee.REAL)
def place_hadamards(
    editor: Editor, *, linears: Chosen = (), attentions: Chosen = (), seed: int | None = None
) -> None:
    """Put a transform in front of the chosen linears, and of q and k of the chosen attentions.

    seed: random signs in front of each transform, another vector for each; None: none.
    Raises InputError where a name is no call of that kind.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in _chosen(editor, linears, *LINEARS):
        reason = _against_linear(editor, node)
        if reason is None:
            readers.setdefault(argument(node, "input"), []).append(node)
        else:
            editor.refused(node, reason)
    for x, group in readers.items():
        _turn_linears(editor, x, group, _signs(x, generator))
    for node in _chosen(editor, attentions, ATTENTION):
        reason = _against_attention(node)
        if reason is None:
            _turn_attention(editor, node, _signs(argument(node, "query"), generator))
        else:
            editor.refused(node, reason)


def _chosen(editor: Editor, chosen: Chosen, *targets: object) -> list[fx.Node]:
    found = list(editor.calls(*targets))
    if callable(chosen):
        return [node for node in found if chosen(node)]
    unknown = sorted(set(chosen) - {node.name for node in found})
    if unknown:
        raise InputError(
            "Hadamard transforms are asked for at calls that are not there",
            expected=f"names of nodes that call {' or '.join(map(str, targets))}",
            got=", ".join(unknown),
        )
    return [node for node in found if node.name in chosen]


def _against_linear(editor: Editor, node: fx.Node) -> str | None:
    weight = editor.tensor(argument(node, "weight"))
    if weight is None:
        return "its weight is computed in the graph, not a constant"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return _against_value(argument(node, "input"))


def _against_attention(node: fx.Node) -> str | None:
    reasons = (_against_value(argument(node, name)) for name in ("query", "key"))
    return next((reason for reason in reasons if reason is not None), None)


def _against_value(x: fx.Node) -> str | None:
    kind, size = dtype(x), static_size((shape(x) or (None,))[-1])
    if is_call_of(x, *ROUNDERS, dequantize_cache.overload):
        return f"{x.name} is quantized already; transforms go in front of quantizers"
    if is_call_of(x, hadamard.overload):
        return f"{x.name} is a Hadamard transform already"
    if kind is None or not kind.is_floating_point:
        return f"{x.name} is {kind}"
    if size is None or not factor(size):
        return f"{x.name} has {size} channels, which no Hadamard matrix divides"
    return None


def _size(x: fx.Node) -> int:
    size = static_size((shape(x) or (None,))[-1])
    assert size is not None
    return size


def _signs(x: fx.Node, generator: torch.Generator | None) -> Tensor | None:
    """Random signs float64 for the channels of x, or None."""
    if generator is None:
        return None
    return torch.randint(0, 2, (_size(x),), generator=generator).double() * 2 - 1


def _turned(editor: Editor, x: fx.Node, signs: Tensor | None, reader: fx.Node) -> fx.Node:
    """x (times signs) H, in front of its first reader."""
    source = x
    if signs is not None:
        held = vector(editor, x.args[1], _size(x)) if is_call_of(x, aten.mul.Tensor) else None
        source = x if held is None else x.args[0]  # type: ignore[assignment]  # the product's other operand
        factors = signs.to(dtype(x)) if held is None else held * signs.to(held.dtype)
        factors_node = editor.constant(factors, f"{x.name}_signs")
        source = editor.call(aten.mul.Tensor, source, factors_node, like=reader)
    return editor.call(hadamard.overload, source, list(factor(_size(x))), False, like=reader)


def _turn_linears(editor: Editor, x: fx.Node, readers: list[fx.Node], signs: Tensor | None) -> None:
    turned = _turned(editor, x, signs, readers[0])
    weights: dict[fx.Node, fx.Node] = {}
    for node in readers:
        read = argument(node, "weight")
        if read not in weights:
            weight = editor.tensor(read)
            assert weight is not None
            weights[read] = editor.constant(_folded(weight, signs), editor.name_of(read))
        set_argument(node, "weight", weights[read])
        set_argument(node, "input", turned)
    kept = [value(read) for read in weights if read.users]
    what = "random signs and a Hadamard transform" if signs is not None else "a Hadamard transform"
    editor.applied(
        readers[0],
        f"{what} of its input, the inverse in the weights of {len(readers)} linears",
        **_facts(x),
        readers=[module_path(node) for node in readers],
        **({"bytes_added": sum(t.numel() * t.element_size() for t in kept)} if kept else {}),
    )


def _folded(weight: Tensor, signs: Tensor | None) -> Tensor:
    """W H (W diag(signs) H) in float64, a part of the rows at a time: memory stays near that of the result."""
    weight, size = weight.detach(), weight.shape[-1]
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    at_once = max(1, _ELEMENTS_AT_ONCE // size)
    for rows, into in zip(weight.split(at_once), result.split(at_once), strict=True):
        wide = rows.double() if signs is None else rows.double() * signs
        into.copy_(apply_hadamard(wide, factor(size)))
    return result


def _turn_attention(editor: Editor, node: fx.Node, signs: Tensor | None) -> None:
    made: dict[fx.Node, fx.Node] = {}
    for name in ("query", "key"):
        x = argument(node, name)
        if x not in made:
            made[x] = _turned(editor, x, signs, node)
        set_argument(node, name, made[x])
    editor.applied(node, "a Hadamard transform of queries and keys, per head", **_facts(next(iter(made))))


def _facts(x: fx.Node) -> dict[str, Any]:
    """What the report says of a transform: its size, its orders, and additions for each row."""
    size = _size(x)
    orders = factor(size)
    additions = size * sum(steps(orders))
    return {"channels": size, "orders": list(orders), "blocks": size // prod(orders), "additions": additions}
