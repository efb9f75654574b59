"""Quantized embedding tables become packed ones: only the rows that are looked up are decoded.

    embedding(dequantize_weight(w), ids) → embedding_packed(ids, pack(w))

REAL: the same `scale (w - zero)` for the same rows; codes and scales are kept bit for bit. An id below 0 is an
error for the ATen operator and counts from the end for the packed one; valid programs have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from ..compiler.dialect import embedding_packed
from ..compiler.dialect.packing import pack_embedding_codes
from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from .layers import QuantizedWeight, codes_of, constant_name, layers, narrowest_bits


@define_pass(Guarantee.REAL)
def pack_embeddings(editor: Editor) -> None:
    """Pack all embeddings whose table is a `dequantize_weight` of constants."""
    for new, facts in pack_quantized_tables(editor):
        editor.applied(new, f"int{facts['bits']} table packed", **facts)


def pack_quantized_tables(editor: Editor) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
    """Replace each embedding of a quantized table by a packed one; yields the new call and facts about it."""
    packed: dict[fx.Node, dict[str, fx.Node]] = {}
    for layer in layers(editor):
        quantized = codes_of(editor, layer) if layer.kind == "embeddings" else None
        if isinstance(quantized, str):
            editor.refused(layer.node, quantized)
        if not isinstance(quantized, QuantizedWeight):
            continue
        bits = narrowest_bits(quantized, (4,))
        if layer.weight not in packed:
            packed[layer.weight] = _pack(editor, quantized, bits)
        nodes = packed[layer.weight]
        new = editor.call(
            embedding_packed.overload,
            layer.input,
            nodes["table"],
            nodes["table_scale"],
            nodes.get("table_zero"),
            quantized.codes.shape[1],
            bits,
            quantized.group_size,
            like=layer.node,
        )
        editor.replace(layer.node, new)
        held = [editor.tensor(node) for node in nodes.values()]
        size = sum(t.numel() * t.element_size() for t in held if t is not None)
        yield new, {"bits": bits, "group_size": quantized.group_size, "bytes_after": size}


def _pack(editor: Editor, quantized: QuantizedWeight, bits: int) -> dict[str, fx.Node]:
    tensors = {
        "table": pack_embedding_codes(quantized.codes, bits),
        "table_scale": quantized.scale,
        "table_zero": quantized.zero,
    }
    return {
        part: editor.constant(tensor, constant_name(editor, quantized.node, part))
        for part, tensor in tensors.items()
        if tensor is not None
    }
