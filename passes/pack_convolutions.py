"""Quantized convolutions become packed ones: the int8 linear layout of the unfolded weight `[O, C kh kw]`.

    conv(quantize_dequantize(x), dequantize_weight(w)) + b → conv_packed(x, pack(w), b)

REAL: the same rounded input and the same codes; padding inserts the zero point, whose value is a real zero.
Refused: inputs that are not quantized, or quantized per token (a pair for each row of the last dimension,
which the integer sums over channels cannot carry), weights with zero points or groups.
"""

from __future__ import annotations

from ..compiler.dialect import conv_packed, quantize_dequantize
from ..compiler.dialect.packing import pack_linear
from ..compiler.editor import Editor
from ..compiler.graph import argument
from ..compiler.passes import Guarantee, define_pass
from .layers import Layer, QuantizedWeight, codes_of, constant_name, convolution_sizes, is_call_of, layers


@define_pass(Guarantee.REAL)
def pack_convolutions(editor: Editor) -> None:
    """Pack all convolutions on quantized inputs whose weight is a `dequantize_weight` of constants."""
    packed = {}
    for layer in layers(editor):
        if layer.kind != "convolutions":
            continue
        quantized = codes_of(editor, layer)
        if quantized is None:
            continue
        reason = quantized if isinstance(quantized, str) else _reason_against(layer, quantized)
        if isinstance(quantized, str) or reason is not None:
            editor.refused(layer.node, reason or "")
            continue
        x, params = (argument(layer.input, name) for name in ("x", "params"))
        sizes = convolution_sizes(layer).values()
        if layer.weight not in packed:
            matrix = pack_linear(quantized.codes.flatten(1), quantized.scale, None, 8, 0)
            tensors = {"packed": matrix.weight, "packed_scale": matrix.scale, "packed_wsum": matrix.wsum}
            packed[layer.weight] = (
                matrix,
                [
                    editor.constant(tensor, constant_name(editor, quantized.node, part))
                    for part, tensor in tensors.items()
                ],
            )
        matrix, nodes = packed[layer.weight]
        bias = argument(layer.node, "bias")
        new = editor.call(
            conv_packed.overload, x, params, *nodes, bias, *sizes, matrix.n, "none", like=layer.node
        )
        editor.replace(layer.node, new)
        editor.applied(
            new,
            f"int8 {list(quantized.codes.shape)} packed",
            bits=8,
            group_size=0,
            bytes_after=matrix.nbytes,
            activations="uint8",
        )


def _reason_against(layer: Layer, quantized: QuantizedWeight) -> str | None:
    if not is_call_of(layer.input, quantize_dequantize.overload):
        return "its input is not quantized, and packed convolutions take integers only"
    granularity, bits = (argument(layer.input, name) for name in ("granularity", "bits"))
    if bits != 8:
        return f"its input is quantized to {bits} bits; packed convolutions quantize to 8"
    if argument(layer.input, "params") is None and granularity != "sample":
        return f"its input is quantized per {granularity}; packed convolutions take a pair per sample or one for all"
    if quantized.zero is not None or quantized.group_size:
        return (
            "its weight has zero points or groups; packed convolutions take one scale for each output channel"
        )
    return None
