"""`isofold::gated`: `activation(gate) * up`, the product in a gated MLP (GLU variants, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import activate
from .operator import Cost, operator, tensor_bytes


@operator(
    onnx_name="Gated",
    schema="(Tensor gate, Tensor up, str activation) -> Tensor",
    shape=lambda gate, up, activation: torch.empty_like(gate, memory_format=torch.contiguous_format),
    cost=lambda gate, up, activation: Cost(0, 3 * tensor_bytes(gate), 5 * int(gate.numel())),
)
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up of one shape → the same shape."""
    return (activate(gate, activation) * up).contiguous()
