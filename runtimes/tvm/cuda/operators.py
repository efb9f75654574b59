"""The emitters: for every dialect operator, the function that plans its kernels."""

from __future__ import annotations

from collections.abc import Callable

from . import (
    attention_operators,
    convolution,
    dense,
    grouped,
    linears,
    outliers,
    pointwise,
    row_operators,
    samples,
    sparse_operators,
)
from .plan import Call, Plan

EMITTERS: dict[str, Callable[[Call], Plan]] = {
    "attention": attention_operators.attention,
    "attention_cached": attention_operators.attention_cached,
    "conv_packed": convolution.conv_packed,
    "dequantize_cache": pointwise.dequantize_cache,
    "dequantize_codebook": pointwise.dequantize_codebook,
    "dequantize_coded": pointwise.dequantize_coded,
    "dequantize_outliers": outliers.dequantize_outliers,
    "dequantize_weight": pointwise.dequantize_weight,
    "embedding_packed": pointwise.embedding_packed,
    "gated": pointwise.gated,
    "hadamard": row_operators.hadamard,
    "linear_codebook": linears.linear_codebook,
    "linear_coded": linears.linear_coded,
    "linear_dense": dense.linear_dense,
    "linear_fp8": linears.linear_fp8,
    "linear_grouped": grouped.linear_grouped,
    "linear_grouped_dense": grouped.linear_grouped_dense,
    "linear_grouped_packed": grouped.linear_grouped_packed,
    "linear_grouped_packed_float": grouped.linear_grouped_packed_float,
    "linear_outliers": linears.linear_packed,
    "linear_outliers_float": linears.linear_packed_float,
    "linear_packed": linears.linear_packed,
    "linear_packed_float": linears.linear_packed_float,
    "linear_sparse": sparse_operators.linear_sparse,
    "linear_sparse_float": sparse_operators.linear_sparse_float,
    "norm": row_operators.norm,
    "norm_quantize": row_operators.norm_quantize,
    "quantize_activation": row_operators.quantize_activation,
    "quantize_activation_fp8": row_operators.quantize_activation_fp8,
    "quantize_cache": row_operators.quantize_cache,
    "quantize_dequantize": samples.quantize_dequantize,
    "quantize_dequantize_fp8": samples.quantize_dequantize_fp8,
    "quantize_linear_packed": linears.quantize_linear_packed,
    "rotary": pointwise.rotary,
}
"""Dialect operator → its plan on the GPU."""
