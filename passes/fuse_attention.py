"""Scaled dot product attention reads and writes `[B, S, H, D]`: `isofold.attention`, without transposes.

    transpose(sdpa(transpose(q), transpose(k), transpose(v), mask))             → attention(q, k, v, mask)
    transpose(sdpa(transpose(q), dequantize_cache(k), dequantize_cache(v), mask)) → attention_cached(q, k, v, mask)

Exchanging the head and sequence dimensions commutes with everything that works inside one head and position:
rotary embedding (it then has head_dim_index 2), norms over the head, slices of it, products with a number or a vector
over the head, Hadamard transforms of it, and quantizers with a pair for each token and head, or one for all. So the
exchanges move through these down to the attention, and cancel there; where there is none to cancel, one is inserted.

Side conditions: four dimensions; static numbers of heads, where those of queries are a multiple of those of keys
and values (`enable_gqa`; one key head also serves all without it); equal batch; float32; no dropout. What other
operators read of the old layout is kept, as an exchange of the new value. The mask is passed on as it is (both
operators add it, or take -inf where it is False), and `is_causal` sees keys t <= s in both. torch takes either of the
two; here both go together, so a mask `(t <= s) and padding` leaves only the padding `[B, 1, 1, T]`, proved for all
sizes by its closed form. A row that sees nothing
gives 0 in both (torch's softmax for attention is safe since 2.5).

Exactness: REAL; another order of sums rounds differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.canonicalize.closed_form import ClosedForms
from ..compiler.canonicalize.masks import is_causal
from ..compiler.canonicalize.match import (
    MULTIPLICATIONS,
    RESHAPES,
    equal_shapes,
    equal_sizes,
    is_call,
)
from ..compiler.dialect import (
    attention,
    attention_cached,
    dequantize_cache,
    hadamard,
    quantize_dequantize,
    rotary,
)
from ..compiler.editor import Editor
from ..compiler.graph import argument, dtype, shape
from ..compiler.passes import Guarantee, define_pass

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


@define_pass(Guarantee.REAL)
def fuse_attention(editor: Editor) -> None:
    """See the module."""
    tables: dict[fx.Node, fx.Node] = {}
    forms = ClosedForms(editor)
    for node in editor.calls(_SDPA):
        reason = _reason_against(node)
        if reason is not None:
            editor.refused(node, reason)
        else:
            _fuse(editor, node, forms, tables)


def _reason_against(node: fx.Node) -> str | None:
    sizes = [shape(argument(node, name)) or () for name in ("query", "key", "value")]
    if any(len(size) != 4 for size in sizes):
        return f"queries, keys and values have {[len(s) for s in sizes]} dimensions instead of four"
    if argument(node, "dropout_p") != 0:
        return f"it drops weights at random (dropout_p = {argument(node, 'dropout_p')})"
    if dtype(node) != torch.float32:
        return f"it computes in {dtype(node)}, not float32"
    (batch, heads, _, depth), (key_batch, key_heads, _, key_depth), values = sizes
    if not all(isinstance(size, int) for size in (heads, depth, key_heads, key_depth, values[1], values[3])):
        return "the number or the size of the heads is not static"
    # Keys and values are as many, whatever their symbols are: the product of probabilities and values has no broadcast.
    if not (equal_sizes(batch, key_batch) and equal_sizes(batch, values[0])):
        return f"batches are broadcast: {sizes}"
    if depth != key_depth or key_heads != values[1]:
        return f"keys and values do not fit: {sizes}"
    shared = argument(node, "enable_gqa") or key_heads == 1
    if key_heads != heads and not (shared and heads % key_heads == 0):
        return f"{heads} query heads on {key_heads} key heads"
    return None


def _fuse(editor: Editor, node: fx.Node, forms: ClosedForms, tables: dict[fx.Node, fx.Node]) -> None:
    heads, depth = (shape(node.args[0]) or ())[1::2]  # type: ignore[arg-type]  # a node, by the operator's schema
    kv_heads = (shape(node.args[1]) or ())[1]  # type: ignore[arg-type]  # a node, by the operator's schema
    given = argument(node, "scale")
    scale = float(given) if given is not None else float(depth) ** -0.5
    codes = _codes(node)
    reads = []
    for position in range(1 if codes else 3):
        x = node.args[position]
        assert isinstance(x, fx.Node)
        reads.append(_exchanged(editor, x, node, tables))
    mask, causal = _split_causal(forms, argument(node, "attn_mask"), argument(node, "is_causal"))
    if codes:
        *coded, group = codes
        new = editor.call(
            attention_cached.overload, *reads, *coded[:4], mask, heads, kv_heads, *coded[4:], 0, scale, causal, 0.0,
            group, like=node,
        )  # fmt: skip
    else:
        new = editor.call(
            attention.overload, *reads, mask, heads, kv_heads, 0, 0, 0, scale, causal, 0.0, like=node
        )
    back = editor.call(aten.transpose.int, new, 1, 2, like=node)
    editor.replace(node, back)
    _cancel(editor, back, new)
    inserted = sum(is_exchange(x) for x in reads) + (not back._erased)
    what = f"attention on codes of {codes[6]} bits" if codes else "attention without transposes"
    editor.applied(new, what, transposes_left=inserted, heads=heads, kv_heads=kv_heads)


def _codes(node: fx.Node) -> tuple[Any, ...] | None:
    """Codes and pairs of keys and of values, their depths, bits and group, where an attention reads nothing else."""
    keys, values = node.args[1:3]
    if not (is_call(keys, dequantize_cache.overload) and is_call(values, dequantize_cache.overload)):
        return None
    names = ("codes", "params", "depth", "bits", "group")
    parts = [[argument(x, name) for name in names] for x in (keys, values)]
    (k, k_params, depth, *form), (v, v_params, value_depth, *other) = parts
    return (k, k_params, v, v_params, depth, value_depth, *form) if form == other else None


def _split_causal(forms: ClosedForms, mask: Any, causal: bool) -> tuple[Any, bool]:
    """The mask without its part `t <= s`, and whether queries see only keys up to their own."""
    if not is_call(mask, *_ANDS) or dtype(mask) != torch.bool or len(shape(mask) or ()) != 4:
        return mask, causal
    for part, other in ((0, 1), (1, 0)):
        if is_causal(forms.as_operand(mask.args[part], mask)) and dtype(mask.args[other]) == torch.bool:  # type: ignore[arg-type]  # a node
            return _split_causal(forms, mask.args[other], True)
    return mask, causal


def is_exchange(node: object) -> bool:
    """Whether the node exchanges dimensions 1 and 2 of four."""
    if not isinstance(node, fx.Node) or len(shape(node) or ()) != 4:
        return False
    dims: Any = node.args[1:]
    if is_call(node, aten.transpose.int):
        return {int(d) % 4 for d in dims} == {1, 2}
    if is_call(node, aten.permute.default):
        return [int(d) % 4 for d in dims[0]] == [0, 2, 1, 3]
    return False


def _reaches_exchange(x: object) -> bool:
    while isinstance(x, fx.Node) and not is_exchange(x):
        if not _works_inside_a_head(x):
            return False
        x = x.args[0]
    return isinstance(x, fx.Node)


def _works_inside_a_head(x: fx.Node) -> bool:
    """Whether the operator does the same at every head and position, so that it does not see their order."""
    if is_call(x, rotary.overload):
        return argument(x, "head_dim_index") == 1
    if is_call(x, quantize_dequantize.overload):
        return argument(x, "params") is not None or argument(x, "granularity") == "token"
    if is_call(x, hadamard.overload):
        return True
    if is_call(x, *_NORMS):
        return len(argument(x, "normalized_shape")) == 1
    if is_call(x, aten.slice.Tensor):
        return int(argument(x, "dim")) % 4 == 3
    factor = x.args[1] if is_call(x, *MULTIPLICATIONS) else None
    if isinstance(factor, fx.Node):
        return factor.op == "get_attr" and len(shape(factor) or ()) == 1
    return isinstance(factor, (int, float))


def _exchanged(editor: Editor, x: fx.Node, reader: fx.Node, tables: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node with the value of x `[B, H, S, D]` as `[B, S, H, D]`; x's other readers get an exchange of it."""
    if is_exchange(x):
        assert isinstance(x.args[0], fx.Node)
        return x.args[0]
    if not _reaches_exchange(x):
        return editor.call(aten.transpose.int, x, 1, 2, like=x, before=reader)
    source = x.args[0]
    assert isinstance(source, fx.Node)
    inner = _exchanged(editor, source, reader, tables)
    if is_call(x, rotary.overload):
        cos, sin = (_exchanged_table(editor, x.args[i], tables) for i in (1, 2))
        new = editor.call(rotary.overload, inner, cos, sin, 2, *x.args[4:], like=x)
    else:
        named: dict[str, Any] = dict(x.kwargs)
        new = editor.call(x.target, inner, *x.args[1:], like=x, **named)
    editor.replace(x, editor.call(aten.transpose.int, new, 1, 2, like=x))
    return new


def _exchanged_table(editor: Editor, table: Any, tables: dict[fx.Node, fx.Node]) -> fx.Node:
    """A table `[B | 1, 1, S, R]` as `[B | 1, S, 1, R]`: made once, next to what it is made from."""
    source = table
    if is_call(table, aten.unsqueeze.default) and int(table.args[1]) in (1, -3):  # type: ignore[arg-type]  # a number
        source = table.args[0]
    if source not in tables:
        after = source.next
        while after.op in ("placeholder", "get_attr"):
            after = after.next
        if source is table:
            tables[source] = editor.call(aten.transpose.int, table, 1, 2, like=table, before=after)
        else:
            tables[source] = editor.call(aten.unsqueeze.default, source, 2, like=table, before=after)
    return tables[source]


def _cancel(editor: Editor, back: fx.Node, new: fx.Node) -> None:
    """Let exchanges of `back` read `new`, through views and copies that change nothing."""
    for user in list(back.users):
        if is_call(user, *RESHAPES, aten.clone.default) and equal_shapes(user, back):
            editor.replace(user, back)
            _cancel(editor, back, new)
            return
    for user in list(back.users):
        if is_exchange(user):
            for copy in list(user.users):
                if is_call(copy, aten.clone.default):
                    editor.replace(copy, user)
            editor.replace(user, new)
    if not back._erased and not back.users:
        editor.erase(back)
