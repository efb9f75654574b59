"""Random packed linears, and what they compute in float64 (docs/dialect.md), for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isofold.compiler.dialect import packing

ACTIVATIONS = {
    "none": lambda v: v,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
}

FORMATS = [(bits, group) for bits in (8, 4, 3, 2) for group in (0, 32, 64, 128) if group or bits >= 4]
"""(bits, group size) of all packed linears."""


@dataclass
class Case:
    """One linear with its packed form; rows of a gated one are interleaved."""

    n: int
    k: int
    bits: int
    group_size: int
    activation: str
    gated: bool
    packed: packing.PackedLinear
    weight: Tensor  # float64 [rows, k]
    bias: Tensor | None

    @property
    def kp(self) -> int:
        return packing.ceil_to(self.k, packing.alignment(self.group_size))

    def finish(
        self, product: Tensor, magnitude: Tensor, residual: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """Bias, gate, activation, residual on ``[m, rows]``: the output, and the scale of its rounding errors."""
        if self.bias is not None:
            product = product + self.bias.double()
            magnitude = magnitude + self.bias.double().abs()
        function = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = (half.T for half in packing.split_gated(product.T.contiguous(), self.n))
            gate_size, up_size = (half.T for half in packing.split_gated(magnitude.T.contiguous(), self.n))
            y, magnitude = function(gate) * up, gate_size * up.abs() + up_size * gate.abs() + up.abs()
        else:
            y = function(product)
        if residual is not None:
            y = y + torch.from_numpy(residual).double()
        return y, magnitude + 1


def random_case(
    rng: np.random.Generator,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    zero: bool = False,
    activation: str = "none",
    gated: bool = False,
    bias: bool = False,
    extreme: bool = False,
) -> Case:
    """A random linear; ``extreme``: every code at one of the ends of the range."""
    low, high = packing.code_range(bits, symmetric=not zero)
    groups = -(-k // group_size) if group_size else 1

    def half() -> tuple[Tensor, Tensor, Tensor | None]:
        codes = torch.from_numpy(rng.integers(low, high + 1, (n, k), dtype=np.int8))
        if extreme:
            codes = torch.where(codes > 0, high, low).to(torch.int8)
        scale = torch.from_numpy(rng.uniform(0.001, 0.01, (n, groups)).astype(np.float32))
        steps = packing.zero_steps(bits)
        ends = (-128, 128) if steps > 1 else (low, high + 1)
        points = torch.from_numpy(rng.integers(*ends, (n, groups), dtype=np.int8)) if zero else None
        points = points / steps if points is not None and steps > 1 else points
        return codes, packing.storable_scale(scale, group_size)[0], points

    if gated:
        pairs = zip(half(), half(), strict=True)
        codes, scale, points = (None if a is None else packing.interleave_gated(a, b) for a, b in pairs)
    else:
        codes, scale, points = half()
    packed = packing.pack_linear(codes, scale, points, bits, group_size)
    weight = packing.dequantize(codes, scale.double(), points, group_size)
    vector = torch.from_numpy(rng.standard_normal(codes.shape[0]).astype(np.float32)) if bias else None
    return Case(n, k, bits, group_size, activation, gated, packed, weight, vector)
