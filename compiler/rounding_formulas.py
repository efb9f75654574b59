"""Formulas of PyTorch's own rounding operators whose kernels say nothing to a tracer.

    fake_quantize(x, s, z, lo, hi)    (clamp(round(x / s) + z, lo, hi) - z) s
    quantize(x, s, z, lo, hi, dtype)  clamp(round(x / s) + z, lo, hi) as dtype,  dequantize: (x - z) s
    choose_qparams(x, lo, hi, eps)    s = max((high - low) / (hi - lo), eps),  z = clamp(lo - round(low / s), lo, hi)

with low = min(0, min x) and high = max(0, max x). Kernels of `torch.fake_quantize_*` are compiled, refuse float64 and
have no shape functions (`_declare_shapes` adds them, without which models with dynamic sizes are not even captured);
those of `quantized_decomposed` with tensors for numbers take them out with `.item()`, or branch on whether the range is
valid, where these formulas pass NaN on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _rounded(x: Tensor, scale: Any, zero: Any, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The rounded value in the type of x, and where it is not clamped."""
    codes = torch.round(x * (1.0 / scale)) + zero
    return ((codes.clamp(low, high) - zero) * scale).to(x.dtype), (codes >= low) & (codes <= high)


def _per_channel(
    x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    sizes = [-1 if d == axis % x.dim() else 1 for d in range(x.dim())]
    return _rounded(x, scale.reshape(sizes), zero.reshape(sizes), low, high)


def _where_enabled(
    x: Tensor, scale: Tensor, zero: Tensor, enabled: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    rounded, inside = _rounded(x, scale, zero, low, high)
    on = enabled != 0
    return torch.where(on, rounded, x), inside | ~on


def _quantize(x: Tensor, scale: Tensor, zero: Tensor, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(low, Tensor):
        low, high = low.reshape(()), high.reshape(())
    codes = torch.round(x.to(torch.float32) * (1.0 / scale.reshape(()))) + zero.reshape(())
    return torch.clamp(codes, low, high).to(dtype)


def _dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: Any,
    high: Any,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return (x.to(out_dtype or torch.float32) - zero.reshape(())) * scale.reshape(())


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(x)
    return low.reshape(1).clamp(max=0), high.reshape(1).clamp(min=0)


def _choose(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    least, most = _range(x)
    scale = ((most - least) / float(high - low)).clamp(min=eps)
    zero = (low - torch.round(least / scale)).clamp(low, high)
    return scale.to(torch.float64), zero.to(torch.int64)


def _choose_symmetric(
    x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    least, most = _range(x)
    scale = (torch.maximum(-least, most) / (float(high - low) / 2)).clamp(min=eps)
    zero = torch.full_like(scale, 128 if dtype == torch.uint8 else 0)
    return scale.to(torch.float64), zero.to(torch.int64)


#: By the operator's name with its overload.
FORMULAS: dict[str, Callable[..., Any]] = {
    "aten::fake_quantize_per_tensor_affine": lambda *args: _rounded(*args)[0],
    "aten::fake_quantize_per_tensor_affine.tensor_qparams": lambda *args: _rounded(*args)[0],
    "aten::fake_quantize_per_tensor_affine_cachemask": _rounded,
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _where_enabled,
    "aten::fake_quantize_per_channel_affine": lambda *args: _per_channel(*args)[0],
    "aten::fake_quantize_per_channel_affine_cachemask": _per_channel,
    "quantized_decomposed::quantize_per_tensor.tensor": _quantize,
    "quantized_decomposed::quantize_per_tensor.tensor2": _quantize,
    "quantized_decomposed::dequantize_per_tensor.tensor": _dequantize,
    "quantized_decomposed::dequantize_per_tensor.tensor2": _dequantize,
    "quantized_decomposed::choose_qparams.tensor": _choose,
    "quantized_decomposed::choose_qparams_symmetric.tensor": _choose_symmetric,
}


def _declare_shapes() -> torch.library.Library:
    """Shape functions that ATen has not."""
    library = torch.library.Library("aten", "IMPL")
    for name in (
        "fake_quantize_per_tensor_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "fake_quantize_per_channel_affine_cachemask",
    ):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            library.impl(
                name,
                lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)),
                "Meta",
            )
    return library


_SHAPES = _declare_shapes()
"""What a library registers goes when it goes."""
