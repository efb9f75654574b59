"""Operators that capture replaces by arithmetic, because their kernels take float32 only.

Programs are also run in float64, to verify passes. Fake quantization is round to nearest even on a grid (PyTorch's
documentation of `fake_quantize_per_tensor_affine`): `s (clamp(round(x / s) + z, low, high) - z)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _per_tensor(x: Tensor, scale: Any, zero: Any, low: int, high: int) -> Tensor:
    return ((torch.round(x * (1.0 / scale)) + zero).clamp(low, high) - zero) * scale


def _per_channel(x: Tensor, scale: Tensor, zero: Tensor, axis: int, low: int, high: int) -> Tensor:
    sizes = [1] * x.dim()
    sizes[axis] = -1
    return _per_tensor(x, scale.reshape(sizes), zero.reshape(sizes), low, high)


DECOMPOSITIONS: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    aten.fake_quantize_per_tensor_affine.default: _per_tensor,
    aten.fake_quantize_per_tensor_affine.tensor_qparams: _per_tensor,
    aten.fake_quantize_per_channel_affine.default: _per_channel,
}
"""For `ExportedProgram.run_decompositions`; all other operators stay as they are."""
