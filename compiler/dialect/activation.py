"""Activation functions that epilogues know, by the names used in operator attributes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the named activation elementwise."""
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            "Unknown activation in an operator attribute",
            expected=" | ".join(ACTIVATIONS),
            got=repr(activation),
        )
    return ACTIVATIONS[activation](x)
