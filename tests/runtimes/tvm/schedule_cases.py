"""Small modules whose kernels TVM makes, for the default schedules: one of each kind, with ragged sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


class Lambda(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def _norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)


CASES: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "sum of tensors": (lambda x, y: x + y * 2, (randn(101, 130), randn(101, 130))),
    "broadcast": (lambda x, y: torch.relu(x + y), (randn(101, 130), randn(130))),
    "activations": (
        lambda x: torch.tanh(x) * torch.sigmoid(x) * torch.exp(-x) + F.gelu(x),
        (randn(64, 301),),
    ),
    "transpose": (lambda x: x.transpose(1, 2) + 1, (randn(8, 40, 70),)),
    "heads": (lambda x: x.reshape(x.shape[0], x.shape[1], 4, 16).transpose(1, 2) * 2, (randn(6, 40, 64),)),
    "softmax of rows": (lambda x: F.softmax(x, -1), (randn(64, 300),)),
    "softmax of columns": (lambda x: F.softmax(x, 1), (randn(8, 50, 64),)),
    "log softmax": (lambda x: F.log_softmax(x, -1), (randn(64, 301),)),
    "masked softmax": (
        lambda x: F.softmax(x.masked_fill(torch.ones(70, 70).triu(1).bool(), -1e9), -1),
        (randn(4, 70, 70),),
    ),
    "norm": (_norm, (randn(50, 301),)),
    "sum of rows": (lambda x: x.sum(-1), (randn(64, 300),)),
    "sum of columns": (lambda x: x.sum(0), (randn(300, 65),)),
    "sum of all": (lambda x: x.sum(), (randn(300, 65),)),
    "mean of planes": (lambda x: x.mean((2, 3)), (randn(3, 40, 40, 40),)),
    "largest of rows": (lambda x: x.amax(-1), (randn(64, 300),)),
    "place of the largest": (lambda x: x.argmax(-1).float(), (randn(64, 301),)),
    "variance": (lambda x: torch.var(x, -1, correction=1), (randn(64, 300),)),
    "running sum": (lambda x: x.cumsum(-1), (randn(64, 300),)),
    "matrix product": (lambda x, y: x @ y, (randn(70, 97), randn(97, 131))),
    "matrix product, right side turned": (lambda x, y: x @ y.T, (randn(70, 97), randn(131, 97))),
    "one row": (lambda x, y: x @ y.T, (randn(1, 960), randn(300, 960))),
    "batched product": (lambda x, y: x @ y, (randn(12, 70, 64), randn(12, 64, 50))),
    "scores": (lambda x, y: x @ y.transpose(-1, -2) * 0.5, (randn(12, 70, 64), randn(12, 50, 64))),
    "linear and gelu": (
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        (randn(70, 96), randn(130, 96), randn(130)),
    ),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, padding=1),
        (randn(2, 32, 101), randn(48, 32, 3), randn(48)),
    ),
    "conv1d, stride": (lambda x, w: F.conv1d(x, w, stride=2), (randn(1, 32, 100), randn(48, 32, 3))),
    "conv2d": (
        lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1)),
        (randn(2, 16, 28, 28), randn(32, 16, 3, 3), randn(32)),
    ),
    "conv2d, stride": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=3),
        (randn(1, 3, 56, 56), randn(20, 3, 7, 7)),
    ),
    "conv2d 1 x 1": (lambda x, w: F.conv2d(x, w), (randn(1, 64, 14, 14), randn(32, 64, 1, 1))),
    "depthwise": (
        lambda x, w: F.conv2d(x, w, padding=1, groups=32),
        (randn(1, 32, 28, 28), randn(32, 1, 3, 3)),
    ),
    "grouped": (lambda x, w: F.conv1d(x, w, padding=2, groups=4), (randn(1, 32, 100), randn(32, 8, 5))),
    "transposed": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2, padding=1),
        (randn(1, 32, 100), randn(32, 16, 4)),
    ),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), (randn(1, 32, 56, 56),)),
    "embedding": (lambda i, w: F.embedding(i, w), (torch.arange(160).reshape(4, 40) % 100, randn(100, 96))),
    "concatenation": (lambda x, y: torch.cat([x, y], 1), (randn(80, 100), randn(80, 60))),
    "padding": (lambda x: F.pad(x, (3, 4)), (randn(80, 200),)),
    "slice": (lambda x: x[:, 3:150] * 2, (randn(80, 200),)),
    "group norm": (lambda x, w, b: F.group_norm(x, 4, w, b), (randn(2, 32, 40, 40), randn(32), randn(32))),
    "batch norm": (
        lambda x, w, b: F.batch_norm(x, w, b.abs() + 1),
        (randn(2, 32, 40, 40), randn(32), randn(32)),
    ),
    "rotation": (
        lambda x, c: torch.cat([-x[..., 32:], x[..., :32]], -1) * c,
        (randn(4, 50, 64), randn(50, 64)),
    ),
    "selection": (lambda x: torch.where(x > 0, x, x * 0.1), (randn(64, 300),)),
}
"""name → (function, arguments)."""

DYNAMIC: dict[str, dict[int, dict[int, str]]] = {
    "sum of tensors": {0: {0: "m", 1: "n"}, 1: {0: "m", 1: "n"}},
    "broadcast": {0: {0: "m"}},
    "activations": {0: {0: "m", 1: "n"}},
    "transpose": {0: {0: "m", 1: "n"}},
    "heads": {0: {0: "m", 1: "n"}},
    "softmax of rows": {0: {0: "m", 1: "n"}},
    "softmax of columns": {0: {0: "m", 1: "n"}},
    "norm": {0: {0: "m"}},
    "sum of rows": {0: {0: "m", 1: "n"}},
    "sum of columns": {0: {0: "m"}},
    "place of the largest": {0: {0: "m", 1: "n"}},
    "matrix product": {0: {0: "m"}},
    "matrix product, right side turned": {0: {0: "m"}, 1: {0: "n"}},
    "batched product": {0: {0: "b", 1: "m"}, 1: {0: "b", 2: "n"}},
    "scores": {0: {0: "b", 1: "m"}, 1: {0: "b", 1: "n"}},
    "linear and gelu": {0: {0: "m"}},
    "conv1d": {0: {0: "m", 2: "n"}},
    "conv2d": {0: {0: "m", 2: "n"}},
    "transposed": {0: {2: "n"}},
    "embedding": {0: {0: "m", 1: "n"}},
    "concatenation": {0: {0: "m"}, 1: {0: "m"}},
    "padding": {0: {0: "m", 1: "n"}},
    "running sum": {0: {0: "m", 1: "n"}},
}
"""name → argument → dimension → its name."""


def other_sizes(name: str, args: Sequence[Tensor]) -> list[Tensor]:
    """Arguments of other sizes in the dynamic dimensions: 3 more (in the same range of values)."""
    made = []
    for i, tensor in enumerate(args):
        shape = list(tensor.shape)
        for dim in DYNAMIC[name].get(i, {}):
            shape[dim] += 3
        if tensor.dtype == torch.int64:
            made.append(torch.arange(torch.Size(shape).numel()).reshape(shape) % 100)
        else:
            made.append(randn(*shape))
    return made


def dynamic_shapes(name: str, count: int) -> Any:
    """torch.export's description of the dynamic dimensions."""
    names = sorted({n for dims in DYNAMIC[name].values() for n in dims.values()})
    made = {n: torch.export.Dim(n, min=2, max=4096) for n in names}
    spec = [{d: made[n] for d, n in DYNAMIC[name].get(i, {}).items()} or None for i in range(count)]
    return {"args": tuple(spec)}
