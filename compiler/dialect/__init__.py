"""The isofold dialect: torch custom operators for what ATen cannot say (docs/dialect.md).

Importing this package registers every operator. `OPERATORS` maps names to their records.
"""

from .attention import attention
from .attention_cached import attention_cached
from .conv_packed import conv_packed
from .dequantize_cache import dequantize_cache
from .dequantize_codebook import dequantize_codebook
from .dequantize_coded import dequantize_coded
from .dequantize_outliers import dequantize_outliers
from .dequantize_weight import dequantize_weight
from .embedding_packed import embedding_packed
from .gated import gated
from .hadamard import hadamard
from .linear_codebook import linear_codebook
from .linear_coded import linear_coded
from .linear_dense import linear_dense
from .linear_fp8 import linear_fp8
from .linear_grouped import linear_grouped
from .linear_grouped_dense import linear_grouped_dense
from .linear_grouped_packed import linear_grouped_packed
from .linear_grouped_packed_float import linear_grouped_packed_float
from .linear_outliers import linear_outliers
from .linear_outliers_float import linear_outliers_float
from .linear_packed import linear_packed
from .linear_packed_float import linear_packed_float
from .linear_sparse import linear_sparse
from .linear_sparse_float import linear_sparse_float
from .norm import norm
from .norm_quantize import norm_quantize
from .operator import NAMESPACE, ONNX_DOMAIN, ONNX_VERSION, OPERATORS, Cost, Operator, operator_of
from .quantize_activation import quantize_activation
from .quantize_activation_fp8 import quantize_activation_fp8
from .quantize_cache import quantize_cache
from .quantize_dequantize import quantize_dequantize
from .quantize_dequantize_fp8 import quantize_dequantize_fp8
from .quantize_linear_packed import quantize_linear_packed
from .rotary import rotary

__all__ = [
    "NAMESPACE",
    "ONNX_DOMAIN",
    "ONNX_VERSION",
    "OPERATORS",
    "Cost",
    "Operator",
    "attention",
    "attention_cached",
    "conv_packed",
    "dequantize_cache",
    "dequantize_codebook",
    "dequantize_coded",
    "dequantize_outliers",
    "dequantize_weight",
    "embedding_packed",
    "gated",
    "hadamard",
    "linear_codebook",
    "linear_coded",
    "linear_dense",
    "linear_fp8",
    "linear_grouped",
    "linear_grouped_dense",
    "linear_grouped_packed",
    "linear_grouped_packed_float",
    "linear_outliers",
    "linear_outliers_float",
    "linear_packed",
    "linear_packed_float",
    "linear_sparse",
    "linear_sparse_float",
    "norm",
    "norm_quantize",
    "operator_of",
    "quantize_activation",
    "quantize_activation_fp8",
    "quantize_cache",
    "quantize_dequantize",
    "quantize_dequantize_fp8",
    "quantize_linear_packed",
    "rotary",
]
