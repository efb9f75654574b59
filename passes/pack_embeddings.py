"""Quantized embedding tables become packed ones: only the rows that are looked up are decoded.

    embedding(dequantize_weight(w), ids) → embedding_packed(ids, pack(w))

REAL: the same `scale (w - zero)` for the same rows; codes and scales are kept bit for bit. An id below 0 is an
error for the ATen operator and counts from the end for the packed one; valid programs have none.
"""

from __future__ import annotations

from ..compiler.dialect import embedding_packed
from ..compiler.dialect.packing import pack_embedding_codes
from ..compiler.editor import Editor
from ..compiler.passes import Guarantee, define_pass
from .layers import codes_of, constant_name, fits_four_bits, layers


@define_pass(Guarantee.REAL)
def pack_embeddings(editor: Editor) -> None:
    """Pack all embeddings whose table is a `dequantize_weight` of constants."""
    packed = {}
    for layer in layers(editor):
        if layer.kind != "embeddings":
            continue
        quantized = codes_of(editor, layer)
        if quantized is None:
            continue
        if isinstance(quantized, str):
            editor.refused(layer.node, quantized)
            continue
        bits = 4 if fits_four_bits(quantized.codes) else 8
        if layer.weight not in packed:
            tensors = {
                "table": pack_embedding_codes(quantized.codes, bits),
                "table_scale": quantized.scale,
                "table_zero": quantized.zero,
            }
            packed[layer.weight] = {
                part: editor.constant(tensor, constant_name(editor, quantized.node, part))
                for part, tensor in tensors.items()
                if tensor is not None
            }
        nodes = packed[layer.weight]
        count, dim = quantized.codes.shape
        new = editor.call(
            embedding_packed.overload,
            layer.input,
            nodes["table"],
            nodes["table_scale"],
            nodes.get("table_zero"),
            dim,
            bits,
            quantized.group_size,
            like=layer.node,
        )
        size = sum(
            t.numel() * t.element_size() for t in (editor.tensor(n) for n in nodes.values()) if t is not None
        )
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"int{bits} table {count} x {dim} packed",
            bits=bits,
            group_size=quantized.group_size,
            bytes_after=size,
        )
