"""One model to compile: a module on tensors, two sets of inputs, and what may vary between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim

DynamicShapes = tuple[Mapping[int, object] | None, ...]

#: Named once, so that inputs which share a size share its name.
BATCH = Dim("batch", min=1, max=1024)
SEQUENCE = Dim("sequence", min=1, max=4096)
TARGET = Dim("target", min=1, max=4096)


def sequence_up_to(positions: int, least: int = 1) -> Dim:
    """The sequence of a model that has a table of `positions`."""
    return Dim("sequence", min=least, max=positions)


@dataclass(frozen=True)
class ModelCase:
    """What `torch.export.export` and the tests need.

    `args` and `other_args` are valid inputs of different sizes in every dimension that `dynamic_shapes` (one
    entry for each argument) frees. `static` says what is not free, and why.
    """

    name: str
    module: nn.Module
    args: tuple[Tensor, ...]
    other_args: tuple[Tensor, ...]
    dynamic_shapes: DynamicShapes
    static: str | None = None


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Inside, torch draws from `seed`; outside, its random state is what it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill `module` in place with random values at which every parameter matters; set evaluation mode.

    Initializers set gains to one, biases to zero and matrices so small that a block hardly moves its residual
    stream; a wrong fold would not show. Here matrices get variance 1 / fan-in, vectors and running statistics
    a tenth of noise around their initial value. Three dimensions outside of a convolution are a matrix for each expert.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for owner in module.modules():
            for parameter in owner.parameters(recurse=False):
                if isinstance(owner, nn.Embedding):
                    parameter.copy_(0.5 * noise(parameter))
                elif parameter.dim() >= 2 and min(parameter.shape) > 1:
                    stacked = parameter.dim() == 3 and not isinstance(owner, nn.modules.conv._ConvNd)
                    fan_in = parameter.shape[-1] if stacked else parameter[0].numel()
                    parameter.copy_(noise(parameter) / fan_in**0.5)
                else:
                    parameter.add_(0.1 * noise(parameter))
            if isinstance(owner, nn.modules.batchnorm._BatchNorm) and owner.running_var is not None:
                assert owner.running_mean is not None
                owner.running_mean.add_(0.1 * noise(owner.running_mean))
                owner.running_var.mul_(torch.exp(0.2 * noise(owner.running_var)))
    return module.eval()


def token_ids(batch: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """int64 `[batch, length]` in 3..vocabulary-1 (the low ones are padding and marks in most tokenizers)."""
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def padding_mask(batch: int, length: int) -> Tensor:
    """int64 `[batch, length]`: one for real tokens; every row after the first ends in some padding."""
    kept = torch.tensor([max(1, length - 2 * row) for row in range(batch)])
    return (torch.arange(length) < kept[:, None]).long()


def noise(*shape: int, seed: int = 0) -> Tensor:
    """float32 standard normal values of the given shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
