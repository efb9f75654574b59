"""Every dialect operator as a function of standard ONNX operators.

Exported nodes have the operator's own name in the domain `ai.isofold`. Where the op library is registered
ONNX Runtime runs its kernel; where it is not, it runs these bodies, which decode the packed layouts exactly
(docs/dialect.md) and repeat the arithmetic of the PyTorch references.

ONNX has no way to ask inside a function whether an optional input is there, so a body is built for one
signature: which inputs are present, their ranks, and the values of the attributes. Different signatures of
one operator become overloads of one function (`overload` of FunctionProto, IR version 10). An operator with
one signature in a model has the empty overload. ONNX Runtime up to 1.26 ignores overloads, so there files with several
signatures of one operator need the op library (which never looks at bodies); 1.28 and newer run them without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ...compiler.dialect import ONNX_DOMAIN, OPERATORS
from ...compiler.errors import UnsupportedError
from . import activation_functions as activations
from . import attention_functions as attentions
from . import coded_functions as coded
from . import linear_functions as linears
from . import weight_functions as weights
from .body import Body
from .function_call import Builder, Call

BODIES: dict[str, Builder] = {
    function.__name__: function
    for function in (
        attentions.attention,
        attentions.attention_cached,
        linears.conv_packed,
        attentions.dequantize_cache,
        coded.dequantize_codebook,
        coded.dequantize_coded,
        weights.dequantize_outliers,
        weights.dequantize_weight,
        linears.embedding_packed,
        linears.gated,
        activations.hadamard,
        linears.linear_codebook,
        linears.linear_coded,
        linears.linear_dense,
        linears.linear_fp8,
        linears.linear_grouped,
        linears.linear_grouped_dense,
        linears.linear_grouped_packed,
        linears.linear_grouped_packed_float,
        linears.linear_outliers,
        linears.linear_outliers_float,
        linears.linear_packed,
        linears.linear_packed_float,
        linears.linear_sparse,
        linears.linear_sparse_float,
        activations.norm,
        activations.norm_quantize,
        activations.quantize_activation,
        activations.quantize_activation_fp8,
        attentions.quantize_cache,
        activations.quantize_dequantize,
        activations.quantize_dequantize_fp8,
        linears.quantize_linear_packed,
        attentions.rotary,
    )
}
"""Operator name → builder of its body."""


def build_function(
    name: str, inputs: Mapping[str, ir.Value | None], attributes: Sequence[ir.Attr]
) -> ir.Function:
    """The function for one use of the dialect operator `name`.

    inputs: the node's actual inputs by argument name, None where absent; only their dtypes and shapes are read.
    """
    if name not in BODIES:
        raise UnsupportedError(
            "No ONNX lowering for a dialect operator",
            got=f"isofold::{name}",
            expected=" | ".join(sorted(BODIES)),
        )
    formal = {
        argument: ir.Value(
            name=argument, type=actual.type if actual else None, shape=actual.shape if actual else None
        )
        for argument, actual in inputs.items()
    }
    present = {
        argument: formal[argument] if actual is not None else None for argument, actual in inputs.items()
    }
    body = Body()
    results = BODIES[name](Call(present, {a.name: a.value for a in attributes}), body)
    for index, result in enumerate(results):
        result.name = f"result_{index}"
    return body.function(ONNX_DOMAIN, OPERATORS[name].onnx_name, list(formal.values()), results, attributes)
