"""Other spellings of a model: twins that compute the same function with the same weights, written in other operators.

    program = SPELLINGS["fused"].program(registry.get("llama"))

A spelling rewrites every layer of a kind in a copy of the module, whatever architecture it belongs to: linears are
found by their type, those that read one value by running the model once, and attention by replacing the function that
all models call. What comes out must have the channel spaces of the original; `outline` is what is compared.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.program import Program
from isofold.compiler.spaces.analysis import Spaces
from isofold.models.case import ModelCase

HEADS = 4
"""Into how many parts spellings with one more dimension split channels that this number divides."""


def outline(spaces: Spaces) -> tuple[Counter[tuple[str, int, int]], int, int]:
    """Spaces by group, size and copies, and the numbers of free scales and of free shifts, as scalars.

    A fused parameter joins what were several, so parameters and values are not counted; nor are roots of vectors, of
    which one may hold what were two.
    """
    found = Counter((s.group.name, s.size, s.copies) for s in spaces.spaces)
    counts = [
        sum(math.prod(a.size for a in solution.ordered_support(root)) for root in solution.free_roots())
        for solution in (spaces.scales, spaces.shifts)
    ]
    return found, counts[0], counts[1]


# ---- linears


class Respelled(nn.Module):
    """A linear whose product is computed by a function of (input, weight `[out, in]`); the bias is added behind it."""

    def __init__(self, layer: nn.Module, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        self.weight, self.bias, self.product = layer.weight, layer.bias, product

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        y = self.product(x, self.weight.t() if self.transposed else self.weight)
        return y + self.bias if isinstance(self.bias, Tensor) else y


def by_einsum(x: Tensor, weight: Tensor) -> Tensor:
    """One letter for the channels of each side."""
    return torch.einsum("...k,nk->...n", x, weight)


def by_einsum_of_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Channels of both sides as heads times channels, as the weights of some frameworks have them."""
    n, k = weight.shape
    if n % HEADS or k % HEADS:
        return by_einsum(x, weight)
    cut = weight.reshape(HEADS, n // HEADS, HEADS, k // HEADS)
    return torch.einsum("...gc,hdgc->...hd", x.unflatten(-1, (HEADS, -1)), cut).flatten(-2)


def by_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """The operator `@`."""
    return x @ weight.t()


def by_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """A pointwise convolution on `[batch, channels, length]`."""
    if x.dim() != 3:
        return F.linear(x, weight)
    return F.conv1d(x.transpose(1, 2), weight[:, :, None]).transpose(1, 2)


def by_image_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """A pointwise convolution on `[batch, channels, length, 1]`."""
    if x.dim() != 3:
        return F.linear(x, weight)
    y = F.conv2d(x[:, :, None].permute(0, 3, 1, 2), weight[:, :, None, None])
    return y.permute(0, 2, 3, 1).squeeze(2)


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, layer) of all linears."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if type(child) in (nn.Linear, Conv1D):
                yield owner, name, child


def respell(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, ModelCase], nn.Module]:
    """All linears by another product."""

    def rewrite(module: nn.Module, case: ModelCase) -> nn.Module:
        for owner, name, layer in linears(module):
            setattr(owner, name, Respelled(layer, product))
        return module

    return rewrite


# ---- several linears as one, one as several


class Fused(nn.Module):
    """The weights of several linears that read one value, as one linear."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.product: Callable[[Tensor, Tensor], Tensor] | None = None
        self.sizes = [layer.out_features for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
        biases = [layer.bias for layer in layers]
        if all(b is None for b in biases):
            self.bias = None
        else:
            zeros = [torch.zeros(size, dtype=self.weight.dtype) for size in self.sizes]
            parts = [z if b is None else b for b, z in zip(biases, zeros, strict=True)]
            self.bias = nn.Parameter(torch.cat([*parts]))

    def forward(self, x: Tensor) -> Tensor:
        if self.product is None:
            return F.linear(x, self.weight, self.bias)
        y = self.product(x, self.weight)
        return y + self.bias if isinstance(self.bias, Tensor) else y


class Part(nn.Module):
    """One of the results of a fused linear: split, or (images' attention) a view by parts and heads, permuted."""

    def __init__(self, fused: Fused, index: int, permuted: bool) -> None:
        super().__init__()
        self.fused, self.index, self.permuted = fused, index, permuted

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused
        y = fused(x)
        size, count = fused.sizes[0], len(fused.sizes)
        if not self.permuted or x.dim() != 3 or set(fused.sizes) != {size} or size % HEADS:
            return y.split(fused.sizes, -1)[self.index]
        heads = y.reshape(*x.shape[:2], count, HEADS, size // HEADS).permute(2, 0, 3, 1, 4)
        return heads.unbind(0)[self.index].transpose(1, 2).reshape(*x.shape[:2], size)


def fuse(permuted: bool) -> Callable[[nn.Module, ModelCase], nn.Module]:
    """Linears that read one value become one."""

    def rewrite(module: nn.Module, case: ModelCase) -> nn.Module:
        read: list[tuple[Tensor, nn.Module]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda m, args: read.append((args[0], m)))
            for _, _, layer in linears(module)
        ]
        with torch.no_grad():
            module(*case.args)
        for hook in hooks:
            hook.remove()
        uses = Counter(layer for _, layer in read)
        readers: dict[int, list[nn.Module]] = {}
        for x, layer in read:
            if uses[layer] == 1:
                readers.setdefault(id(x), []).append(layer)
        places = {layer: (owner, name) for owner, name, layer in linears(module)}
        for layers in readers.values():
            if len(layers) > 1 and all(type(layer) is nn.Linear for layer in layers):
                fused = Fused(layers)  # type: ignore[arg-type]  # checked above
                for index, layer in enumerate(layers):
                    owner, name = places[layer]
                    setattr(owner, name, Part(fused, index, permuted))
        return module

    return rewrite


class Separate(nn.Module):
    """One linear as several for parts of its outputs, whose results are joined."""

    def __init__(self, layer: Any, count: int) -> None:
        super().__init__()
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        self.weights = nn.ParameterList([w.clone() for w in weight.chunk(count)])
        self.biases = None
        if layer.bias is not None:
            self.biases = nn.ParameterList([b.clone() for b in layer.bias.chunk(count)])

    def forward(self, x: Tensor) -> Tensor:
        biases = self.biases if self.biases is not None else [None] * len(self.weights)
        return torch.cat([F.linear(x, w, b) for w, b in zip(self.weights, biases, strict=True)], -1)


def separate(module: nn.Module, case: ModelCase) -> nn.Module:
    """Linears with three times as many outputs as inputs (queries, keys, values, in this order) become three."""
    for owner, name, layer in linears(module):
        n, k = layer.weight.shape[:: -1 if isinstance(layer, Conv1D) else 1]  # type: ignore[index]
        if n == 3 * k:
            setattr(owner, name, Separate(layer, 3))
    return module


# ---- attention


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    einsum: bool,
) -> Tensor:
    """What torch's documentation of scaled_dot_product_attention says, in products and a softmax."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) if einsum else query @ key.transpose(-2, -1)
    scores = scores * factor
    if is_causal:
        rows = torch.arange(query.shape[-2])[:, None]
        visible = torch.arange(key.shape[-2])[None, :] <= rows
        scores = scores.masked_fill(~visible, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value) if einsum else weights @ value


@contextmanager
def attention_written_out(einsum: bool) -> Iterator[None]:
    """Inside, `F.scaled_dot_product_attention` is products and a softmax."""

    def function(*args: Any, **kwargs: Any) -> Tensor:
        return _written_out(*args, **kwargs, einsum=einsum)

    with mock.patch.object(F, "scaled_dot_product_attention", function):
        yield


# ---- all of them


def _same(module: nn.Module, case: ModelCase) -> nn.Module:
    return module


@dataclass(frozen=True)
class Spelling:
    """How a model is rewritten.

    rewrite: changes a copy of the module. context: what holds while it is captured.
    """

    what: str
    rewrite: Callable[[nn.Module, ModelCase], nn.Module] = _same
    context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def program(self, case: ModelCase) -> Program:
        """The model respelled, with the same weights and inputs: captured and canonical."""
        module = self.rewrite(copy.deepcopy(case.module), case).eval()
        with self.context():
            captured = capture(module, case.args, dynamic_shapes=case.dynamic_shapes)
        return canonicalize(captured).program


def _all(module: nn.Module, case: ModelCase) -> nn.Module:
    module = fuse(True)(module, case)
    for fused in module.modules():
        if isinstance(fused, Fused):
            fused.product = by_einsum_of_heads
    return respell(by_einsum_of_heads)(module, case)


#: What the plain spelling is compared with. "separate" is for models whose fused linear has queries, keys and values
#: one behind the other, and "eager" attention is what `registry.get(name, attention="eager")` gives.
SPELLINGS: dict[str, Spelling] = {
    "matmul": Spelling("x @ W^T + b for each linear", respell(by_matmul)),
    "einsum": Spelling("an einsum for each linear", respell(by_einsum)),
    "einsum of heads": Spelling(
        "an einsum over heads and channels of both sides", respell(by_einsum_of_heads)
    ),
    "conv1d": Spelling("a pointwise convolution, channels first, for each linear", respell(by_convolution)),
    "conv2d": Spelling("a pointwise convolution of images for each linear", respell(by_image_convolution)),
    "fused": Spelling("one linear for all that read one value, and a split", fuse(False)),
    "fused heads": Spelling("the same, read through a view by parts and heads", fuse(True)),
    "separate": Spelling("three linears and a concatenation where one wrote q, k and v", separate),
    "softmax": Spelling("products and a softmax for attention", context=lambda: attention_written_out(False)),
    "einsum attention": Spelling(
        "einsums and a softmax for attention", context=lambda: attention_written_out(True)
    ),
    "all": Spelling("fused, einsums for linears and attention", _all, lambda: attention_written_out(True)),
}
